// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package e2e

import "testing"

// testCorner runs, on the cluster, what implementations of NetworkPolicy are
// known to fail. Each is a test by name, each judges both families.
func testCorner(t *testing.T, s *suite) {
	for _, test := range []struct {
		name string
		run  func(*testing.T, *suite)
	}{
		{"EgressThroughService", testEgressThroughService},
		{"EgressThroughNodePort", testEgressThroughNodePort},
		{"EgressThroughExternalAddress", testEgressThroughExternalAddress},
		{"HostNetworkBackends", testHostNetworkBackends},
		{"RepliesThroughService", testRepliesThroughService},
		{"SessionAffinity", testSessionAffinity},
		{"HeadlessService", testHeadlessService},
		{"TerminatingEndpoints", testTerminatingEndpoints},
		{"Hairpin", testHairpin},
		{"OwnAddress", testOwnAddress},
		{"KubeletProbes", testKubeletProbes},
		{"OtherNode", testOtherNode},
		{"HostNetworkPods", testHostNetworkPods},
		{"OpenConnections", testOpenConnections},
		{"RepliesNeedNoRule", testRepliesNeedNoRule},
		{"SourcePortReuse", testSourcePortReuse},
		{"ForgedReplies", testForgedReplies},
		{"OtherProtocols", testOtherProtocols},
		{"Fragments", testFragments},
		{"DropsAreSilent", testDropsAreSilent},
		{"PodRelabelled", testPodRelabelled},
		{"NamespaceRelabelled", testNamespaceRelabelled},
		{"NamespaceMadeAgain", testNamespaceMadeAgain},
		{"AddressReused", testAddressReused},
		{"CompletedPod", testCompletedPod},
		{"NameWithDots", testNameWithDots},
		{"PodStart", testPodStart},
		{"SamePolicyName", testSamePolicyName},
		{"PolicyRenamed", testPolicyRenamed},
		{"ManyRules", testManyRules},
		{"StaticPod", testStaticPod},
	} {
		t.Run(test.name, func(t *testing.T) { test.run(t, s) })
	}
}

// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

// Package cluster plays a Kubernetes cluster on one machine: a control plane
// and nodes, each a PID 1 in namespaces of its own, with the real kube-apiserver,
// etcd, controllers, scheduler, containerd, kubelet and kube-proxy that package
// build made. The pod network is the reference bridge plugin with static routes
// between nodes, dual stack, and podgate chained to it.
//
// Nothing is added to the machine's first network namespace, and nothing is left
// behind: when the process that started a cluster ends, however it ends, the
// kernel ends every process and namespace of it. What stays after a crash are
// empty cgroups, which the next cluster removes, and the scratch directory.
//
// It needs root, runc, and iptables or nft for kube-proxy.
package cluster

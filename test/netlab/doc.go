// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

// Package netlab plays a node: a network namespace with its own bpffs and its
// own CNI plugins, in which pods come and go through libcni as a container
// runtime would have it.
//
//	dir := t.TempDir()
//	err := netlab.Build(ctx, dir)          // the reference plugins and ours
//	node, err := netlab.New(netlab.Options{Plugins: dir})
//	defer node.Close()
//	pod, result, err := node.AddPod(ctx, conflist, netlab.PodSpec{Namespace: "default", Name: "web"})
//	out, err := pod.Exec(ctx, "ip", "addr")
//	err = node.DelPod(ctx, pod)
//
// Nothing a node makes has a name in the machine's file system: namespaces and
// the bpffs live as long as the process holds them open, so that even a killed
// test leaves none behind. Their paths ([Node.BPFFS], [Pod.NetNS]) go through
// /proc/<pid>/fd and work for every process of the same user. Only the scratch
// directory is a directory; [Node.Close] removes it.
//
// It needs root (CAP_SYS_ADMIN, CAP_NET_ADMIN, CAP_BPF) and is not for
// production.
package netlab

// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

// Scale plays a large cluster to one node: it serves lists and watches of made-up
// objects as an API server does, changes them as clusters do, and measures one
// real "podgate sync" that follows, with real maps and real pods of its node:
// memory, processor time, what it costs the API server, and how long a change
// takes from the moment it is sent until the kernel judges by it.
//
// The server is this program's own, since a real one with its etcd takes more
// memory and processor time for a cluster of that size, and for that many changes
// a second, than the machine that measures should spend beside what it measures.
// It speaks the same protocol: TLS, HTTP/2, streamed lists, watches in protobuf,
// bookmarks, resumed watches and expired ones. Package controlplane has the real
// one for everything where size does not matter.
package main

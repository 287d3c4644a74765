// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

// Package pinning is the only writer of podgate's state, which is nothing but
// pinned BPF objects: there is no database and no process that must live.
//
// An instance lives under one directory of a BPF file system:
//
//	<bpffs>/<name>/           flock'ed by whoever changes something
//	<bpffs>/<name>/v1/maps/   the maps, named as in bpf/include/maps.h
//	<bpffs>/<name>/v1/progs/  from_pod and to_pod
//	<bpffs>/<name>/v1/links/  tcx links, one directory for each endpoint
//
// [Ensure] makes an instance or adopts it, [Open] only adopts. CNI verbs call
// [State.Add], [State.Delete], [State.Check] and [State.GC]; the daemon calls
// [State.Apply], [State.Repair] and [State.Upgrade]. Every change is ordered
// such that the death of the process in the middle leaves packets judged by
// the old state, or dropped, and that doing it again completes it.
package pinning

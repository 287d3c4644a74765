// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

// Package ipamhooks knows where a pod's addresses come from.
//
// For a chained plugin that is the result of the plugins before it
// ([ParseResult], [PodInterfaces]). podgate-ipam learns them earlier: it stands
// between a main plugin and the IPAM plugin that does the work ([Delegate]),
// claims an address the moment it is allocated and gives it back scrubbed.
//
// What claiming means is not known here: see [Claims].
package ipamhooks

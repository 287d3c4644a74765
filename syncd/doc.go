// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

// Package syncd is the sync daemon: it keeps what is enforced on a node equal
// to what a source says.
//
// The kernel enforces without it. A daemon that starts adopts what is pinned
// and changes only what differs; one that dies leaves everything as it is.
// Whatever fails (a file, a policy, an endpoint, a full map) is reported and
// tried again, and stops nothing else.
package syncd

// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

// Package install puts podgate on a node and takes it off again: its binaries,
// its pinned state, a systemd unit where systemd runs, and at last its entry in
// the configuration of the container runtime's network.
//
// Every change is noted in a log before it is made, together with what undoes
// it, and is made such that it is there as a whole or not at all. So a process
// that dies anywhere on the way leaves a node on which pods start as before, and
// doing it again, or undoing it, ends the same as if it had not died. One process
// at a time changes a node.
package install

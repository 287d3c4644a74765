// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

// Package observe shows what the datapath does. It consumes the event ring,
// names what it reads and hands it on: to Hubble's API, and to metrics.
//
// It only reads. Nothing that enforces policy waits for it, and when it is too
// slow events are lost and counted.
package observe

// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

// Package hubble serves Hubble's API: flows as Hubble writes them, to its
// command line, relay and user interface. The messages are those of
// github.com/cilium/cilium/api/v1.
package hubble

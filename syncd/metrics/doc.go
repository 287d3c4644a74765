// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

// Package metrics lets others watch the sync daemon over HTTP: Prometheus
// metrics, and whether it is alive and ready, as the kubelet asks.
//
// A [Daemon] collects what the daemon tells it, [Health] answers the probes,
// and [Server] serves both, together with whatever else is in its registry.
package metrics

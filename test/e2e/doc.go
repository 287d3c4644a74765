// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

// Package e2e tests podgate on a real Kubernetes cluster, which package cluster
// plays on this machine: the Kubernetes project's own network policy tests and
// Conformance, cyclonus, the corner cases that implementations fail, and what
// happens when parts of the cluster die. docs/conformance.md has the results.
//
// It is a module of its own because it speaks to Kubernetes; the programs of the
// cluster are modules below build. `make test-e2e` builds them and runs it.
package e2e

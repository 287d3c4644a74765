// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

// Package oracle compares podgate with evaluators of network policy that share
// nothing with it: the simulator of cyclonus and the engine of
// kube-network-policies. Package cases has what they are asked.
//
// It is a module of its own because of what those two need.
package oracle

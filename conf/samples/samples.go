// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

// Package samples holds network configuration lists with podgate in the chain
// of common main plugins, to read, to install and to test with.
package samples

import "embed"

// FS has one NAME.conflist for each main plugin.
//
//go:embed *.conflist
var FS embed.FS

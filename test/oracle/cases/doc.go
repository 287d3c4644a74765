// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

// Package cases has clusters to ask policy evaluators about: those that
// cyclonus generates and random ones.
package cases

// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

// Package naming names what the datapath speaks of in numbers and addresses:
// endpoints, peers, rules and Services. It reads pinned maps and follows a source
// of objects, and writes nothing.
package naming

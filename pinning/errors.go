// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package pinning

import "errors"

// Errors that callers branch on.
var (
	// ErrNotInstalled: nothing is pinned where the layout says.
	ErrNotInstalled = errors.New("podgate is not set up on this node")
	// ErrNoBPFFS: no BPF file system is mounted, and none may be.
	ErrNoBPFFS = errors.New("no BPF file system is mounted")
	// ErrABI: a pinned map is not of the layout this binary knows.
	ErrABI = errors.New("pinned state has another layout")
	// ErrFull: a map or table has no room.
	ErrFull = errors.New("no room")
	// ErrNotFound: no such endpoint, rule or ruleset.
	ErrNotFound = errors.New("not found")
	// ErrLocked: another process holds the instance or its events for too long.
	ErrLocked = errors.New("held by another process")
	// ErrNoHook: the interface has no hook that podgate can use.
	ErrNoHook = errors.New("no usable hook")
	// ErrDiffers: an endpoint is not as it was set up.
	ErrDiffers = errors.New("endpoint is not as it was set up")
	// ErrNetNS: the caller is not where the node's interfaces are.
	ErrNetNS = errors.New("not the node's network namespace")
	// ErrInvalid: a request that cannot be stored.
	ErrInvalid = errors.New("invalid")
)

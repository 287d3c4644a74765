// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

// Package conflist puts podgate-cni into network configuration lists and takes
// it out again. It works on bytes: whatever is not podgate's own entry stays as
// it is, so that what [Merge] did [Unmerge] undoes byte for byte.
//
// It writes no file. [Pick] says which file of a directory a runtime uses.
package conflist

// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

// Package conf reads the configuration that reaches podgate through a network
// configuration list: podgate-cni's own object ([Parse]) and the ipam object of
// a main plugin that has podgate-ipam for its IPAM ([ParseIPAM]).
//
// Keys that are podgate's must be known and valid; a typing error in a security
// setting must not go unnoticed. Keys of the CNI specification, of its
// conventions and of runtimes are left to those who own them. [Defaults] has
// the value of every key that is not there.
package conf

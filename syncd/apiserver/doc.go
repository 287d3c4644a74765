// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

// Package apiserver is a source of the objects of a Kubernetes API server.
//
// A [Source] lists and watches what policy is made of and keeps of each object
// what policy needs. While the server does not answer everything stays as it
// was, and the batches say so.
//
// NetworkPolicies are read as JSON, because that keeps the fields which only a
// later version of Kubernetes knows; everything else as protobuf.
package apiserver

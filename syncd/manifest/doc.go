// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

// Package manifest translates Kubernetes objects into the intermediate
// representation of package policy, and reads them from YAML and JSON.
//
// [Policy], [Pod] and [Namespace] work on typed objects wherever they come
// from; [Decode] reads the files kubectl reads and writes. Both apply the
// defaults of the API server, because objects made by hand do not have them,
// and both are at least as strict as the API server, because what it rejects
// has no defined meaning. Nothing is guessed: an object that cannot be
// translated exactly is an [*InvalidError] that names object, field and value.
package manifest

// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

// Package source delivers the objects that policy is made of.
//
// A [Source] knows where objects come from and nothing of what becomes of
// them. [Directory] reads Kubernetes manifests from files; package apiserver
// asks an API server.
package source

import (
	"context"
	"slices"
	"time"

	"github.com/podgate/podgate/syncd/manifest"
)

// Source is a place that objects come from.
type Source interface {
	// Load reads the whole state once. Faults of single objects are problems
	// of the batch; the error means that there is no state to speak of.
	Load(ctx context.Context) (Batch, error)
	// Run delivers the whole state and then each change of it, one batch at a
	// time, until ctx is done. It returns earlier, with an error, only when
	// there was no state to deliver.
	Run(ctx context.Context, deliver func(Batch)) error
}

// Batch is a change of state: what is new or different, and what is gone.
type Batch struct {
	Set  []manifest.Object
	Gone []manifest.Key
	// Pending are the kinds of which not all objects are known yet. What is
	// missing of them is not gone.
	Pending []string
	// Problems are all that stand after the batch.
	Problems []Problem
}

// Lacks tells whether objects of some kinds may be missing.
func (b *Batch) Lacks(kinds ...string) bool {
	return slices.ContainsFunc(b.Pending, func(kind string) bool { return slices.Contains(kinds, kind) })
}

// PolicyKinds are the kinds that have to be known before policy is.
func PolicyKinds() []string {
	return []string{manifest.KindPod, manifest.KindNamespace, manifest.KindNetworkPolicy}
}

// Problem is something wrong that a person should look at. What it concerns
// stays as it was before.
type Problem struct {
	// Subject is the file, endpoint or policy concerned.
	Subject string `json:"subject"`
	// Object is the one concerned, if it is one.
	Object manifest.Key `json:"-"`
	Reason string       `json:"reason"`
	// Since is when it was first seen.
	Since time.Time `json:"since"`
}

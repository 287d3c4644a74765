// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package apiserver

import (
	"errors"
	"fmt"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"

	"github.com/podgate/podgate/syncd/manifest"
)

// translate takes what policy needs of an object.
func (f *follower) translate(obj runtime.Object) (*translated, error) {
	name, err := meta.Accessor(obj)
	if err != nil {
		return nil, err
	}
	t := &translated{Object: &f.blank, key: f.key(name), uid: name.GetUID()}
	if node, ok := obj.(*corev1.Node); ok {
		t.object, t.relevant = manifest.NodeOf(node), true
		return t, nil
	}
	object, err := objectOf(obj)
	var invalid *manifest.InvalidError
	switch {
	case errors.As(err, &invalid):
		t.fault = summary(invalid)
	case err != nil:
		return nil, err
	}
	if !f.source.opts.Names {
		object.Workload = manifest.Workload{} // policy has no use for it, and there are many
	}
	t.object, t.relevant = object, f.source.relevant(&object)
	if t.relevant {
		f.share(&t.object)
		t.key = t.object.Key
	}
	return t, nil
}

func objectOf(obj runtime.Object) (manifest.Object, error) {
	raw, ok := obj.(*unstructured.Unstructured)
	if !ok {
		return manifest.Translate(obj)
	}
	text, err := raw.MarshalJSON()
	if err != nil {
		return manifest.Object{}, err
	}
	return manifest.PolicyFromJSON(text)
}

// relevant leaves out what has no address: pods elsewhere before they start and
// after they ended, and what kube-proxy has nothing to do with.
func (s *Source) relevant(o *manifest.Object) bool {
	switch {
	case o.Pod != nil:
		return o.Node == s.opts.Node || len(o.Pod.Addresses) > 0
	case o.Service != nil:
		return len(o.Service.Addresses) > 0
	case o.EndpointSlice != nil:
		return len(o.EndpointSlice.Addresses) > 0
	}
	return true
}

// summary names the first faults of an object: there may be as many as it has
// fields, and people and events have limits.
func summary(invalid *manifest.InvalidError) string {
	const enough = 5
	more := len(invalid.Fields) - enough
	if more <= 0 {
		return invalid.Reason()
	}
	first := *invalid
	first.Fields = first.Fields[:enough]
	return fmt.Sprintf("%s; and %d more", first.Reason(), more)
}

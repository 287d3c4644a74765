// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package apiserver

import (
	"context"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/record"

	"github.com/podgate/podgate/syncd/manifest"
	"github.com/podgate/podgate/syncd/source"
)

// Reasons of the events about objects and about the node.
const (
	reasonObject = "PolicyProblem"
	reasonNode   = "PodgateProblem"
)

// sink writes events.
type sink struct {
	ctx    context.Context // the recorder hands over none
	client rest.Interface
}

// Create implements [record.EventSink].
func (s sink) Create(e *corev1.Event) (*corev1.Event, error) {
	out := &corev1.Event{}
	return out, s.client.Post().Namespace(e.Namespace).Resource("events").Body(e).Do(s.ctx).Into(out)
}

// Update implements [record.EventSink].
func (s sink) Update(e *corev1.Event) (*corev1.Event, error) {
	out := &corev1.Event{}
	return out, s.client.Put().Namespace(e.Namespace).Resource("events").Name(e.Name).Body(e).Do(s.ctx).Into(out)
}

// Patch implements [record.EventSink].
func (s sink) Patch(e *corev1.Event, data []byte) (*corev1.Event, error) {
	out := &corev1.Event{}
	return out, s.client.Patch(types.StrategicMergePatchType).Namespace(e.Namespace).Resource("events").Name(e.Name).
		Body(data).Do(s.ctx).Into(out)
}

// record makes Notify write events until ctx is done.
func (s *Source) record(ctx context.Context) (stop func(), err error) {
	client, err := s.clients.group(corev1.SchemeGroupVersion)
	if err != nil {
		return nil, err
	}
	broadcaster := record.NewBroadcaster(record.WithContext(ctx))
	broadcaster.StartRecordingToSink(sink{ctx, client})
	s.mu.Lock()
	defer s.mu.Unlock()
	s.recorder = broadcaster.NewRecorder(s.clients.scheme, corev1.EventSource{Component: "podgate", Host: s.opts.Node})
	return broadcaster.Shutdown, nil
}

// Notify writes an event about a problem: about its object, if that has to do
// with pods of this node, else about the node. Other nodes have the same
// problem with the same object. What is wrong with the server itself is left
// out.
func (s *Source) Notify(p source.Problem) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.recorder == nil || p.Subject == s.server() {
		return
	}
	if p.Object == (manifest.Key{}) {
		node := &corev1.ObjectReference{APIVersion: "v1", Kind: manifest.KindNode, Name: s.opts.Node, UID: types.UID(s.opts.Node)}
		s.recorder.Event(node, corev1.EventTypeWarning, reasonNode, p.Subject+": "+p.Reason)
		return
	}
	if about := s.reference(p.Object); about != nil {
		s.recorder.Event(about, corev1.EventTypeWarning, reasonObject, "node "+s.opts.Node+": "+p.Reason)
	}
}

// reference is to an object that has to do with pods of this node; otherwise
// nil. Runs under the source's lock.
func (s *Source) reference(key manifest.Key) *corev1.ObjectReference {
	namespace := key.Namespace
	if key.Kind == manifest.KindNamespace {
		namespace = key.Name
	}
	var (
		out  *corev1.ObjectReference
		here bool
	)
	for _, f := range s.followers {
		if f.kind == key.Kind {
			out = &corev1.ObjectReference{
				APIVersion: f.group.String(), Kind: key.Kind, Namespace: key.Namespace, Name: key.Name,
				UID: f.items[nameOf(key)].uid,
			}
		}
		if f.kind != manifest.KindPod {
			continue
		}
		for k := range f.items {
			if here = here || k.namespace == namespace; here {
				break
			}
		}
	}
	if !here {
		return nil
	}
	return out
}

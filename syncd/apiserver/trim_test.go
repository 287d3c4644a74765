// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package apiserver

import (
	"bytes"
	"errors"
	"fmt"
	"reflect"
	"slices"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	quantity "k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/client-go/rest"
	"sigs.k8s.io/randfill"

	"github.com/podgate/podgate/syncd/manifest"
)

// eventOf is a watch event with an object, as an API server sends it.
func eventOf(t testing.TB, codecs serializer.CodecFactory, o runtime.Object) []byte {
	t.Helper()
	info, ok := runtime.SerializerInfoForMediaType(codecs.SupportedMediaTypes(), runtime.ContentTypeProtobuf)
	if !ok {
		t.Fatal("no serializer")
	}
	version := corev1.SchemeGroupVersion
	if _, slice := o.(*discoveryv1.EndpointSlice); slice {
		version = discoveryv1.SchemeGroupVersion
	}
	var object, event bytes.Buffer
	if err := codecs.EncoderForVersion(info.Serializer, version).Encode(o, &object); err != nil {
		t.Fatal(err)
	}
	wrapped := &metav1.WatchEvent{Type: "MODIFIED", Object: runtime.RawExtension{Raw: object.Bytes()}}
	if err := info.StreamSerializer.Encode(wrapped, &event); err != nil {
		t.Fatal(err)
	}
	return event.Bytes()
}

// objectIn decodes what eventOf encodes.
func objectIn(codecs serializer.CodecFactory, event []byte) (runtime.Object, error) {
	info, ok := runtime.SerializerInfoForMediaType(codecs.SupportedMediaTypes(), runtime.ContentTypeProtobuf)
	if !ok {
		return nil, fmt.Errorf("no serializer")
	}
	var wrapped metav1.WatchEvent
	if _, _, err := info.StreamSerializer.Decode(event, nil, &wrapped); err != nil {
		return nil, err
	}
	return runtime.Decode(codecs.UniversalDeserializer(), wrapped.Object.Raw)
}

func testCodecs(t testing.TB) serializer.CodecFactory {
	t.Helper()
	clients, err := newClients(&rest.Config{Host: "localhost"})
	if err != nil {
		t.Fatal(err)
	}
	return clients.codecs
}

// filler makes objects with something in every field, often what is valid.
func filler(seed int64) *randfill.Filler {
	words := []string{
		"", "a", "web", "http", "TCP", "UDP", "10.0.0.1", "10.0.0.2", "fd00::1", "true", "false", "ReplicaSet", "web-abc", "abc",
		"Running", "Failed", "Always", "ClusterIP", "IPv4", "VIP", manifest.AnnotationAudit, corev1.MirrorPodAnnotationKey,
		"pod-template-hash", discoveryv1.LabelServiceName, "InternalIP", "None",
	}
	return randfill.NewWithSeed(seed).NilChance(.2).NumElements(0, 3).MaxDepth(12).Funcs(
		func(s *string, c randfill.Continue) { *s = words[c.Intn(len(words))] },
		func(q *quantity.Quantity, c randfill.Continue) {
			*q = *quantity.NewQuantity(c.Int63n(1000), quantity.DecimalSI)
		},
		func(s *metav1.Time, c randfill.Continue) { *s = metav1.Time{Time: time.Unix(c.Int63n(1<<31), 0)} },
		func(f *metav1.FieldsV1, _ randfill.Continue) { *f = *metav1.NewFieldsV1("{}") },
		func(p *int32, c randfill.Continue) { *p = c.Int31n(70000) },
		oneOf(corev1.ProtocolTCP, corev1.ProtocolUDP, "GRE"),
		oneOf(corev1.PodRunning, corev1.PodSucceeded, corev1.PodFailed),
		oneOf(corev1.ContainerRestartPolicyAlways, corev1.ContainerRestartPolicyNever),
		oneOf(corev1.NodeInternalIP, corev1.NodeExternalIP, corev1.NodeHostName),
		oneOf(corev1.ServiceTypeClusterIP, corev1.ServiceTypeNodePort, corev1.ServiceTypeExternalName),
		oneOf(discoveryv1.AddressTypeIPv4, discoveryv1.AddressTypeFQDN),
	)
}

func oneOf[T any](all ...T) func(*T, randfill.Continue) {
	return func(v *T, c randfill.Continue) { *v = all[c.Intn(len(all))] }
}

// TestTrim asks that nothing is lost that is read, whatever objects have in them.
func TestTrim(t *testing.T) {
	codecs := testCodecs(t)
	for _, example := range []runtime.Object{
		&corev1.Pod{}, &corev1.Node{}, &corev1.Namespace{}, &corev1.Service{}, &discoveryv1.EndpointSlice{},
	} {
		t.Run(reflect.TypeOf(example).Elem().Name(), func(t *testing.T) {
			var before, after int
			for seed := range int64(300) {
				o := example.DeepCopyObject()
				filler(seed).Fill(o)
				event := eventOf(t, codecs, o)
				trimmed := trim(event)
				before, after = before+len(event), after+len(trimmed)
				whole, err := objectIn(codecs, event)
				if err != nil {
					t.Fatal(err)
				}
				part, err := objectIn(codecs, trimmed)
				if err != nil {
					t.Fatalf("trimmed: %v", err)
				}
				same(t, whole, part)
			}
			t.Logf("%d bytes of %d", after, before)
			if after >= before*9/10 {
				t.Errorf("%d bytes of %d are left", after, before)
			}
		})
	}
}

// same compares what is read of two objects.
func same(t *testing.T, whole, part runtime.Object) {
	t.Helper()
	w, err := meta.Accessor(whole)
	if err != nil {
		t.Fatal(err)
	}
	p, err := meta.Accessor(part)
	if err != nil {
		t.Fatal(err)
	}
	for what, of := range map[string]func(metav1.Object) any{
		"resource version": func(m metav1.Object) any { return m.GetResourceVersion() },
		"UID":              func(m metav1.Object) any { return m.GetUID() },
		"annotations":      func(m metav1.Object) any { return m.GetAnnotations() }, // the end of what there is at first
	} {
		if !reflect.DeepEqual(of(w), of(p)) {
			t.Fatalf("%s: %v, whole %v", what, of(p), of(w))
		}
	}
	if node, ok := whole.(*corev1.Node); ok {
		if a, b := manifest.NodeOf(node), manifest.NodeOf(part.(*corev1.Node)); !reflect.DeepEqual(a, b) {
			t.Fatalf("%+v, whole %+v", b, a)
		}
		return
	}
	a, errA := manifest.Translate(whole)
	b, errB := manifest.Translate(part)
	if !reflect.DeepEqual(a, b) || !slices.Equal(faultsOf(errA), faultsOf(errB)) {
		t.Fatalf("%+v (%v), whole %+v (%v)", b, errB, a, errA)
	}
}

// faultsOf are in an order that does not change from one time to the next.
func faultsOf(err error) (all []string) {
	var invalid *manifest.InvalidError
	if !errors.As(err, &invalid) {
		return []string{fmt.Sprint(err)}
	}
	for _, e := range invalid.Fields {
		all = append(all, e.Error())
	}
	slices.Sort(all)
	return all
}

// TestTrimLeaves asks that what is not understood stays as it is.
func TestTrimLeaves(t *testing.T) {
	codecs := testCodecs(t)
	pod := eventOf(t, codecs, &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: "web", Finalizers: []string{"x"}}})
	for name, event := range map[string][]byte{
		"another kind": eventOf(t, codecs, &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: "web", Finalizers: []string{"x"}}}),
		"empty":        {},
		"cut off":      pod[:len(pod)-3],
		"garbage":      []byte("MODIFIED"),
	} {
		if got := trim(event); !bytes.Equal(got, event) {
			t.Errorf("%s: %q became %q", name, event, got)
		}
	}
	if got := trim(pod); len(got) >= len(pod) {
		t.Errorf("%q stays %q", pod, got)
	}
}

// FuzzTrim asks that an event that can be decoded can be so once it is trimmed.
func FuzzTrim(f *testing.F) {
	codecs := testCodecs(f)
	for seed := range int64(5) {
		pod := &corev1.Pod{}
		filler(seed).Fill(pod)
		f.Add(eventOf(f, codecs, pod))
	}
	f.Fuzz(func(t *testing.T, event []byte) {
		whole, err := objectIn(codecs, event)
		if err != nil {
			_ = trim(event) // it may say anything, but must end
			return
		}
		part, err := objectIn(codecs, trim(event))
		if err != nil {
			t.Fatal(err)
		}
		if _, ok := whole.(*corev1.Pod); ok {
			same(t, whole, part)
		}
	})
}

// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package main

import (
	"bufio"
	"bytes"
	"encoding/pem"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/apimachinery/pkg/watch"
)

// history is how many changes of a resource can be watched from the past.
const history = 1 << 16

// bookmarkEvery is how often the API server sends bookmarks.
const bookmarkEvery = time.Minute

// resources that podgate asks for, by path, and as what.
var resources = []struct {
	path, media string
	version     schema.GroupVersion
	example     runtime.Object
}{
	{"/api/v1/pods", runtime.ContentTypeProtobuf, corev1.SchemeGroupVersion, &corev1.Pod{}},
	{"/api/v1/namespaces", runtime.ContentTypeProtobuf, corev1.SchemeGroupVersion, &corev1.Namespace{}},
	{"/api/v1/services", runtime.ContentTypeProtobuf, corev1.SchemeGroupVersion, &corev1.Service{}},
	{"/api/v1/nodes", runtime.ContentTypeProtobuf, corev1.SchemeGroupVersion, &corev1.Node{}},
	{"/apis/discovery.k8s.io/v1/endpointslices", runtime.ContentTypeProtobuf, discoveryv1.SchemeGroupVersion, &discoveryv1.EndpointSlice{}},
	{"/apis/networking.k8s.io/v1/networkpolicies", runtime.ContentTypeJSON, networkingv1.SchemeGroupVersion, &networkingv1.NetworkPolicy{}},
}

// apiServer serves watches of what it is given.
type apiServer struct {
	http        *httptest.Server
	collections map[string]*collection
	revision    atomic.Int64

	requests, bytes, frames atomic.Int64
}

// collection is all objects of one resource.
type collection struct {
	media       string
	encode      func(runtime.Object, io.Writer) error
	frame       func(watch.EventType, []byte, io.Writer) error
	newBookmark func(revision int64, initialEnd bool) runtime.Object

	mu      sync.Mutex
	objects map[string]stored
	// changes since forgotten, and a channel that is closed by the next.
	changes   []change
	forgotten int64
	changed   chan struct{}
}

// stored is an object as it goes over the wire.
type stored struct {
	name     string
	revision int64
	body     []byte
}

type change struct {
	stored
	kind watch.EventType
}

// newServer starts a server on a listener.
func newServer(l net.Listener) (*apiServer, error) {
	s := &apiServer{collections: make(map[string]*collection)}
	scheme := runtime.NewScheme()
	for _, add := range []func(*runtime.Scheme) error{corev1.AddToScheme, discoveryv1.AddToScheme, networkingv1.AddToScheme} {
		if err := add(scheme); err != nil {
			return nil, err
		}
	}
	metav1.AddToGroupVersion(scheme, schema.GroupVersion{Version: "v1"})
	codecs := serializer.NewCodecFactory(scheme)
	for _, r := range resources {
		c, err := newCollection(codecs, r.media, r.version)
		if err != nil {
			return nil, err
		}
		c.newBookmark = func(revision int64, initialEnd bool) runtime.Object {
			o := r.example.DeepCopyObject()
			m, _ := meta.Accessor(o) // each of them has one
			m.SetResourceVersion(strconv.FormatInt(revision, 10))
			if initialEnd {
				m.SetAnnotations(map[string]string{metav1.InitialEventsAnnotationKey: "true"})
			}
			return o
		}
		s.collections[r.path] = c
	}
	s.http = httptest.NewUnstartedServer(s)
	if err := s.http.Listener.Close(); err != nil {
		return nil, err
	}
	s.http.Listener, s.http.EnableHTTP2 = l, true
	s.http.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, slog.LevelError)
	s.http.StartTLS()
	return s, nil
}

func newCollection(codecs serializer.CodecFactory, media string, version schema.GroupVersion) (*collection, error) {
	info, ok := runtime.SerializerInfoForMediaType(codecs.SupportedMediaTypes(), media)
	if !ok {
		return nil, fmt.Errorf("no serializer for %s", media)
	}
	encoder := codecs.EncoderForVersion(info.Serializer, version)
	return &collection{
		media:   media,
		encode:  encoder.Encode,
		objects: make(map[string]stored),
		changed: make(chan struct{}),
		frame: func(kind watch.EventType, body []byte, w io.Writer) error {
			event := &metav1.WatchEvent{Type: string(kind), Object: runtime.RawExtension{Raw: body}}
			return info.StreamSerializer.Encode(event, info.StreamSerializer.NewFrameWriter(w))
		},
	}, nil
}

// certificate of the server, which is its own authority.
func (s *apiServer) certificate() []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.http.Certificate().Raw})
}

// put adds or changes an object.
func (s *apiServer) put(path string, o runtime.Object) error {
	return s.change(path, o, watch.Modified)
}

// remove removes an object.
func (s *apiServer) remove(path string, o runtime.Object) error {
	return s.change(path, o, watch.Deleted)
}

func (s *apiServer) change(path string, o runtime.Object, kind watch.EventType) error {
	c := s.collections[path]
	m, err := meta.Accessor(o)
	if err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	revision := s.revision.Add(1)
	m.SetResourceVersion(strconv.FormatInt(revision, 10))
	var b bytes.Buffer
	if err := c.encode(o, &b); err != nil {
		return err
	}
	key := m.GetNamespace() + "/" + m.GetName()
	now := change{stored{m.GetName(), revision, b.Bytes()}, kind}
	if kind == watch.Deleted {
		delete(c.objects, key)
	} else {
		if _, known := c.objects[key]; !known {
			now.kind = watch.Added
		}
		c.objects[key] = now.stored
	}
	if len(c.changes) == 2*history {
		c.forgotten = c.changes[history-1].revision
		c.changes = append(c.changes[:0:0], c.changes[history:]...)
	}
	c.changes = append(c.changes, now)
	close(c.changed)
	c.changed = make(chan struct{})
	return nil
}

// ServeHTTP serves watches, and swallows events.
func (s *apiServer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	s.requests.Add(1)
	c := s.collections[r.URL.Path]
	q := r.URL.Query()
	switch {
	case r.Method != http.MethodGet:
		_, _ = io.Copy(io.Discard, r.Body)
		w.Header().Set("Content-Type", runtime.ContentTypeJSON)
		w.WriteHeader(http.StatusCreated)
		_, _ = io.WriteString(w, `{"kind": "Event", "apiVersion": "v1"}`)
	case c == nil:
		http.NotFound(w, r)
	case q.Get("watch") == "":
		// Who asks for a list does not know streamed ones.
		http.Error(w, "lists are streamed here", http.StatusNotImplemented)
	default:
		v := &viewer{s: s, c: c, w: bufio.NewWriterSize(counter{w, &s.bytes}, 1<<16), flush: w.(http.Flusher).Flush}
		v.serve(w, r, q)
	}
}

// counter counts what is written.
type counter struct {
	io.Writer
	n *atomic.Int64
}

func (c counter) Write(b []byte) (int, error) {
	c.n.Add(int64(len(b)))
	return c.Writer.Write(b)
}

// viewer is one watch.
type viewer struct {
	s     *apiServer
	c     *collection
	w     *bufio.Writer
	flush func()
	// name of the one object asked for, if it is one.
	name string
	// seen is the revision up to which everything was sent.
	seen int64
}

func (v *viewer) serve(w http.ResponseWriter, r *http.Request, q url.Values) {
	if selector, err := fields.ParseSelector(q.Get("fieldSelector")); err == nil {
		v.name, _ = selector.RequiresExactMatch(metav1.ObjectNameField)
	}
	w.Header().Set("Content-Type", v.c.media+";stream=watch")
	initial := q.Get("sendInitialEvents") == "true"
	if !initial {
		seen, err := strconv.ParseInt(q.Get("resourceVersion"), 10, 64)
		v.c.mu.Lock()
		expired := err != nil || seen < v.c.forgotten
		v.c.mu.Unlock()
		if expired {
			http.Error(w, "too old resource version", http.StatusGone)
			return
		}
		v.seen = seen
	}
	if initial && v.sendAll() != nil {
		return
	}
	bookmarks := time.NewTicker(bookmarkEvery)
	defer bookmarks.Stop()
	for {
		news, more := v.news()
		for _, n := range news {
			if err := v.send(n.kind, n.stored); err != nil {
				return
			}
			v.seen = n.revision
		}
		if v.flushed() != nil {
			return
		}
		select {
		case <-r.Context().Done():
			return
		case <-more:
		case <-bookmarks.C:
			if v.bookmark(false) != nil {
				return
			}
		}
	}
}

// news are the changes not sent yet, more is closed when there are others.
func (v *viewer) news() (news []change, more <-chan struct{}) {
	v.c.mu.Lock()
	defer v.c.mu.Unlock()
	i := len(v.c.changes)
	for i > 0 && v.c.changes[i-1].revision > v.seen {
		i--
	}
	return v.c.changes[i:], v.c.changed
}

// sendAll sends what there is, and a mark that it was all.
func (v *viewer) sendAll() error {
	v.c.mu.Lock()
	all := make([]stored, 0, len(v.c.objects))
	for _, o := range v.c.objects {
		all = append(all, o)
	}
	v.seen = v.s.revision.Load()
	v.c.mu.Unlock()
	for _, o := range all {
		if err := v.send(watch.Added, o); err != nil {
			return err
		}
	}
	return v.bookmark(true)
}

func (v *viewer) bookmark(initialEnd bool) error {
	var b bytes.Buffer
	if err := v.c.encode(v.c.newBookmark(v.seen, initialEnd), &b); err != nil {
		return err
	}
	if err := v.c.frame(watch.Bookmark, b.Bytes(), v.w); err != nil {
		return err
	}
	return v.flushed()
}

func (v *viewer) send(kind watch.EventType, o stored) error {
	if v.name != "" && o.name != v.name {
		return nil
	}
	v.s.frames.Add(1)
	return v.c.frame(kind, o.body, v.w)
}

func (v *viewer) flushed() error {
	if err := v.w.Flush(); err != nil {
		return err
	}
	v.flush()
	return nil
}

// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package apiserver

import (
	"bytes"
	"encoding/binary"
	"slices"

	"google.golang.org/protobuf/encoding/protowire"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
)

// trimming has objects of watches cut down to what is read of them before they are
// decoded. Most of a Pod is environment, volumes, probes and who set which field:
// to make objects of all that is most of what a change would cost otherwise.
type trimming struct{ runtime.NegotiatedSerializer }

// SupportedMediaTypes are those of the serializer.
func (t trimming) SupportedMediaTypes() []runtime.SerializerInfo {
	infos := slices.Clone(t.NegotiatedSerializer.SupportedMediaTypes())
	for i := range infos {
		if stream := infos[i].StreamSerializer; infos[i].MediaType == runtime.ContentTypeProtobuf && stream != nil {
			trimmed := *stream
			trimmed.Serializer = trimmer{stream.Serializer}
			infos[i].StreamSerializer = &trimmed
		}
	}
	return infos
}

// trimmer decodes the events of a watch.
type trimmer struct{ runtime.Serializer }

// Decode implements [runtime.Decoder].
func (t trimmer) Decode(data []byte, defaults *schema.GroupVersionKind, into runtime.Object) (runtime.Object, *schema.GroupVersionKind, error) {
	if _, ok := into.(*metav1.WatchEvent); ok {
		data = trim(data)
	}
	return t.Serializer.Decode(data, defaults, into)
}

// parts are the fields kept of a message in protobuf, by their numbers: of a message
// in it the fields named, or all if there are none.
type parts map[protowire.Number]parts

// The numbers are those of generated.proto beside each API's types, which are part
// of the API and are never given to anything else.
var (
	metaParts = parts{
		1:  nil, // name
		3:  nil, // namespace
		5:  nil, // uid
		6:  nil, // resourceVersion
		8:  nil, // creationTimestamp
		9:  nil, // deletionTimestamp
		11: nil, // labels
		12: nil, // annotations
		13: nil, // ownerReferences
	}
	containerParts = parts{
		6:  nil, // ports
		24: nil, // restartPolicy
	}
	podParts = parts{
		1: metaParts,
		2: { // spec
			2:  containerParts, // containers
			10: nil,            // nodeName
			11: nil,            // hostNetwork
			20: containerParts, // initContainers
		},
		3: { // status
			1:  nil, // phase
			6:  nil, // podIP
			12: nil, // podIPs
		},
	}
	nodeParts = parts{
		1: metaParts,
		3: { // status
			5: nil, // addresses
		},
	}
	serviceParts = parts{
		1: metaParts,
		2: nil, // spec
		3: nil, // status
	}
	endpointSliceParts = parts{
		1: metaParts,
		2: { // endpoints
			1: nil, // addresses
			2: nil, // conditions
		},
		3: nil, // ports
		4: nil, // addressType
	}
)

// partsOf answers what is kept of the objects of a kind; nil is everything.
func partsOf(kind runtime.TypeMeta) parts {
	switch kind {
	case runtime.TypeMeta{APIVersion: "v1", Kind: "Pod"}:
		return podParts
	case runtime.TypeMeta{APIVersion: "v1", Kind: "Node"}:
		return nodeParts
	case runtime.TypeMeta{APIVersion: "v1", Kind: "Namespace"}:
		return parts{1: metaParts}
	case runtime.TypeMeta{APIVersion: "v1", Kind: "Service"}:
		return serviceParts
	case runtime.TypeMeta{APIVersion: "discovery.k8s.io/v1", Kind: "EndpointSlice"}:
		return endpointSliceParts
	}
	return nil
}

// Of what is around an object.
const (
	eventObject   protowire.Number = 2 // of WatchEvent
	extensionRaw  protowire.Number = 1 // of RawExtension
	unknownType   protowire.Number = 1 // of Unknown
	unknownRaw    protowire.Number = 2
	unknownCoding protowire.Number = 3
)

// magic precedes an object (k8s.io/apimachinery, package protobuf).
var magic = []byte("k8s\x00")

// trim is a WatchEvent without what is not read of its object. What is no such
// event, or has an object of another kind, is as it was.
func trim(event []byte) []byte {
	out := make([]byte, 0, min(len(event), 1024))
	out, ok := rewrite(out, event, func(out, object []byte, n protowire.Number) ([]byte, bool) {
		if n != eventObject {
			return out, false
		}
		return rewrite(out, object, func(out, raw []byte, n protowire.Number) ([]byte, bool) {
			unknown, is := bytes.CutPrefix(raw, magic)
			if n != extensionRaw || !is {
				return out, false
			}
			kept, is := keptOf(unknown)
			if !is {
				return out, false
			}
			return rewrite(append(out, magic...), unknown, func(out, object []byte, n protowire.Number) ([]byte, bool) {
				if n != unknownRaw {
					return out, false
				}
				return keep(out, object, kept)
			})
		})
	})
	if !ok {
		return event
	}
	return out
}

// keptOf are the fields kept of an object.
func keptOf(unknown []byte) (kept parts, ok bool) {
	var kind runtime.TypeMeta
	for len(unknown) > 0 {
		n, value, rest := next(unknown)
		switch {
		case rest < 0 || n == unknownCoding && len(value) > 0:
			return nil, false // broken, or compressed
		case n == unknownType && kind.Unmarshal(value) != nil:
			return nil, false
		}
		unknown = unknown[rest:]
	}
	kept = partsOf(kind)
	return kept, kept != nil
}

// keep appends the fields of a message that are kept.
func keep(out, message []byte, kept parts) ([]byte, bool) {
	for len(message) > 0 {
		n, value, rest := next(message)
		if rest < 0 {
			return out, false
		}
		inner, is := kept[n]
		switch {
		case is && (inner == nil || value == nil):
			out = append(out, message[:rest]...)
		case is:
			var ok bool
			if out, ok = nest(out, value, n, func(out, value []byte) ([]byte, bool) { return keep(out, value, inner) }); !ok {
				return out, false
			}
		}
		message = message[rest:]
	}
	return out, true
}

// rewrite appends a message with other values for those that fn says true of.
func rewrite(out, message []byte, fn func(out, value []byte, n protowire.Number) ([]byte, bool)) ([]byte, bool) {
	for len(message) > 0 {
		n, value, rest := next(message)
		if rest < 0 {
			return out, false
		}
		before := len(out)
		var changed bool
		if value != nil {
			out, changed = nest(out, value, n, func(out, value []byte) ([]byte, bool) { return fn(out, value, n) })
		}
		if !changed {
			out = append(out[:before], message[:rest]...)
		}
		message = message[rest:]
	}
	return out, true
}

// nest appends a field whose value fn appends.
func nest(out, value []byte, n protowire.Number, fn func(out, value []byte) ([]byte, bool)) ([]byte, bool) {
	out = protowire.AppendTag(out, n, protowire.BytesType)
	start := len(out)
	out, ok := fn(out, value)
	length := len(out) - start
	// Its length goes before it.
	size := protowire.SizeVarint(uint64(length))
	out = append(out, make([]byte, size)...)
	copy(out[start+size:], out[start:start+length])
	binary.PutUvarint(out[start:], uint64(length))
	return out, ok
}

// next is the first field of a message: its number, its value if that has a
// length, and where the field ends; negative if it is broken.
func next(message []byte) (n protowire.Number, value []byte, end int) {
	n, kind, tag := protowire.ConsumeTag(message)
	if tag < 0 {
		return 0, nil, tag
	}
	size := protowire.ConsumeFieldValue(n, kind, message[tag:])
	if size < 0 {
		return 0, nil, size
	}
	if kind == protowire.BytesType {
		value, _ = protowire.ConsumeBytes(message[tag:])
	}
	return n, value, tag + size
}

// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package manifest

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"iter"
	"strings"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	kjson "sigs.k8s.io/json"
	"sigs.k8s.io/yaml"
)

// Decode reads a file of YAML documents or JSON: NetworkPolicies, Pods,
// Namespaces, and Lists of them as kubectl get -o yaml prints.
//
// An unknown field of a NetworkPolicy is a fault, because it may stand for a
// restriction that was meant; unknown fields of Pods and Namespaces are
// ignored. Any other kind and any duplicate key are faults too. A file with a
// fault has no objects: the error joins one [*FileError] per fault.
func Decode(file string, data []byte) ([]Object, error) {
	d := decoder{file: file}
	for number, doc := range documents(data) {
		d.document = number
		d.decodeDocument(doc)
	}
	if len(d.faults) > 0 {
		return nil, errors.Join(d.faults...)
	}
	return d.objects, nil
}

// document is a part of a file between separators.
type document struct {
	data []byte
	// line of the file that is the document's first.
	line int
	// separator is what follows the --- that ends it, if that is not allowed.
	separator string
}

// documents splits a file at lines that begin with ---, like kubectl, and
// numbers the parts from 1. Parts of blank and comment lines do not count.
func documents(data []byte) iter.Seq2[int, document] {
	return func(yield func(int, document) bool) {
		number, line := 0, 0
		part := document{line: 1}
		flush := func() bool {
			if isBlank(part.data) && part.separator == "" {
				return true
			}
			number++
			return yield(number, part)
		}
		rest := data
		for text := range bytes.Lines(data) {
			line++
			if after, ok := bytes.CutPrefix(text, []byte("---")); ok {
				if after = bytes.TrimSpace(after); len(after) > 0 && after[0] != '#' {
					part.separator = string(after)
				}
				if !flush() {
					return
				}
				rest = rest[len(part.data)+len(text):]
				part = document{line: line + 1, data: rest[:0]}
				continue
			}
			part.data = rest[:len(part.data)+len(text)]
		}
		flush()
	}
}

func isBlank(data []byte) bool {
	for line := range bytes.Lines(data) {
		if line = bytes.TrimSpace(line); len(line) > 0 && line[0] != '#' {
			return false
		}
	}
	return true
}

// decoder collects objects and faults of one file.
type decoder struct {
	file     string
	document int
	objects  []Object
	faults   []error
}

func (d *decoder) fault(line int, object, format string, args ...any) {
	d.faults = append(d.faults, &FileError{
		File: d.file, Line: line, Document: d.document, Object: object, Reason: fmt.Sprintf(format, args...),
	})
}

func (d *decoder) decodeDocument(doc document) {
	if doc.separator != "" {
		d.fault(doc.line+bytes.Count(doc.data, []byte("\n")), "", "unexpected %q after the document separator ---", doc.separator)
		return
	}
	raw := doc.data
	at, err := locate(doc)
	if !json.Valid(raw) { // JSON is not quite a subset of YAML
		if err == nil {
			raw, err = yaml.YAMLToJSONStrict(doc.data)
		}
		if err != nil {
			d.syntaxFault(doc.line, err)
			return
		}
	}
	if string(bytes.TrimSpace(raw)) != "null" {
		d.decodeObject(raw, metav1.TypeMeta{}, at)
	}
}

// syntaxFault reports an error of the YAML parser, which counts lines from the
// start of the document.
func (d *decoder) syntaxFault(first int, err error) {
	for reason := range strings.Lines(strings.TrimPrefix(err.Error(), "yaml: ")) {
		reason = strings.TrimSpace(reason)
		if reason == "unmarshal errors:" {
			continue
		}
		line := 1
		if n, scanErr := fmt.Sscanf(reason, "line %d:", &line); n == 1 && scanErr == nil {
			_, reason, _ = strings.Cut(reason, ": ")
		}
		d.fault(first+line-1, "", "%s", reason)
	}
}

// decodeObject decodes an object or a list of them. Items of a typed list may
// leave out their type: defaults has it.
func (d *decoder) decodeObject(raw []byte, defaults metav1.TypeMeta, at location) {
	var head struct {
		metav1.TypeMeta
		Metadata struct {
			Namespace string `json:"namespace"`
			Name      string `json:"name"`
		} `json:"metadata"`
	}
	if err := kjson.UnmarshalCaseSensitivePreserveInts(raw, &head); err != nil {
		d.fault(at.line(), "", "not a Kubernetes object: %s", decodeReason(err))
		return
	}
	if head.Kind == "" && head.APIVersion == "" {
		head.TypeMeta = defaults
	}
	name := objectName(cmp.Or(head.Kind, "object"), head.Metadata.Namespace, head.Metadata.Name)

	switch kind := head.GroupVersionKind().String(); {
	case head.Kind == "":
		d.fault(at.line(), name, "kind is missing")
	case head.APIVersion == "v1" && head.Kind == "List",
		head.APIVersion == "v1" && head.Kind == "PodList",
		head.APIVersion == "v1" && head.Kind == "NamespaceList",
		head.APIVersion == "networking.k8s.io/v1" && head.Kind == "NetworkPolicyList":
		d.decodeList(raw, head.TypeMeta, at)
	case head.APIVersion == "networking.k8s.io/v1" && head.Kind == KindNetworkPolicy:
		d.decodeInto(raw, &networkingv1.NetworkPolicy{}, name, at, kjson.DisallowDuplicateFields, kjson.DisallowUnknownFields)
	case head.APIVersion == "v1" && head.Kind == KindPod:
		d.decodeInto(raw, &corev1.Pod{}, name, at, kjson.DisallowDuplicateFields)
	case head.APIVersion == "v1" && head.Kind == KindNamespace:
		d.decodeInto(raw, &corev1.Namespace{}, name, at, kjson.DisallowDuplicateFields)
	default:
		d.fault(at.find("kind").line(), name,
			"kind %q is not one of NetworkPolicy (networking.k8s.io/v1), Pod, Namespace, List (v1)", kind)
	}
}

func (d *decoder) decodeList(raw []byte, list metav1.TypeMeta, at location) {
	var body struct {
		metav1.TypeMeta
		metav1.ListMeta `json:"metadata"`
		Items           []json.RawMessage `json:"items"`
	}
	if !d.unmarshal(raw, &body, list.Kind, at, kjson.DisallowDuplicateFields, kjson.DisallowUnknownFields) {
		return
	}
	var item metav1.TypeMeta
	if kind := strings.TrimSuffix(list.Kind, "List"); kind != "" {
		item = metav1.TypeMeta{APIVersion: list.APIVersion, Kind: kind}
	}
	for i, raw := range body.Items {
		d.decodeObject(raw, item, at.find(fmt.Sprintf("items[%d]", i)))
	}
}

func (d *decoder) decodeInto(raw []byte, into any, name string, at location, strict ...kjson.StrictOption) {
	if !d.unmarshal(raw, into, name, at, strict...) {
		return
	}
	obj, err := Translate(into)
	var invalid *InvalidError
	switch {
	case errors.As(err, &invalid):
		for _, f := range invalid.Fields {
			d.fault(at.find(f.Field).line(), name, "%s", f.Error())
		}
	case err != nil:
		d.fault(at.line(), name, "%v", err)
	default:
		obj.File, obj.Line, obj.Document = d.file, at.line(), d.document
		d.objects = append(d.objects, obj)
	}
}

// unmarshal decodes JSON and reports whether it found no fault.
func (d *decoder) unmarshal(raw []byte, into any, name string, at location, strict ...kjson.StrictOption) bool {
	faults, err := kjson.UnmarshalStrict(raw, into, strict...)
	if err != nil {
		d.fault(at.line(), name, "%s", decodeReason(err))
		return false
	}
	for _, err := range faults {
		line := at.line()
		var field kjson.FieldError
		if errors.As(err, &field) {
			line = at.find(field.FieldPath()).line()
		}
		d.fault(line, name, "%v", err)
	}
	return len(faults) == 0
}

// decodeReason is what a JSON decoder says, less its own name.
func decodeReason(err error) string {
	return strings.TrimPrefix(err.Error(), "json: ")
}

// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package manifest

import (
	"fmt"
	"strings"

	"k8s.io/apimachinery/pkg/util/validation/field"
)

// InvalidError says what makes an object untranslatable.
type InvalidError struct {
	Kind, Namespace, Name string
	// Fields are the faults, each with path and value, in the object's order.
	Fields field.ErrorList
}

// Error names the object and each field.
func (e *InvalidError) Error() string {
	return objectName(e.Kind, e.Namespace, e.Name) + ": " + e.Reason()
}

// Reason names each field.
func (e *InvalidError) Reason() string {
	faults := make([]string, len(e.Fields))
	for i, f := range e.Fields {
		faults[i] = f.Error()
	}
	return strings.Join(faults, "; ")
}

// FileError is one fault of a file.
type FileError struct {
	File string
	// Line and Document count from 1.
	Line, Document int
	// Object is kind, namespace and name where they could be read.
	Object string
	// Reason says what is wrong, with field path and value if it is a field.
	Reason string
}

// Error is in the form file:line: reason that editors can follow.
func (e *FileError) Error() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s:%d: ", e.File, e.Line)
	if e.Document > 1 {
		fmt.Fprintf(&b, "document %d: ", e.Document)
	}
	if e.Object != "" {
		b.WriteString(e.Object + ": ")
	}
	b.WriteString(e.Reason)
	return b.String()
}

func objectName(kind, namespace, name string) string {
	if name == "" {
		name = "(no name)"
	}
	if namespace != "" {
		name = namespace + "/" + name
	}
	return kind + " " + name
}

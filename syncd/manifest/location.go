// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package manifest

import (
	"bytes"
	"errors"
	"io"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v3"
)

// location is a place in a file. Decoding goes through JSON, which has no
// lines; the tree of YAML nodes beside it leads from a field path back to one.
type location struct {
	node *yaml.Node
	// first is the line of the file that the tree calls 1.
	first int
}

// locate parses a document for its locations. With an error the location is
// the document's beginning.
func locate(doc document) (location, error) {
	var root, more yaml.Node
	at := location{node: &root, first: doc.line}
	dec := yaml.NewDecoder(bytes.NewReader(doc.data))
	if err := dec.Decode(&root); err != nil && !errors.Is(err, io.EOF) {
		return at, err
	}
	// YAML ends lines in more ways than documents() does. A document hidden that
	// way would be ignored without a word.
	if err := dec.Decode(&more); err == nil {
		return at, errors.New("line " + strconv.Itoa(more.Line) + ": a second document must begin with --- after a newline")
	} else if !errors.Is(err, io.EOF) {
		return at, err
	}
	if root.Kind == yaml.DocumentNode && len(root.Content) > 0 {
		at.node = root.Content[0]
	}
	return at, nil
}

// line of the file, counted from 1.
func (l location) line() int {
	return l.first + max(l.node.Line, 1) - 1
}

// find follows a field path such as spec.ingress[0].from[1].ipBlock.cidr as
// far as it leads; what does not exist is where its parent is.
func (l location) find(path string) location {
	for path != "" {
		var key string
		if inner, ok := strings.CutPrefix(path, "["); ok {
			key, path, _ = strings.Cut(inner, "]")
		} else {
			end := strings.IndexAny(path, ".[")
			if end < 0 {
				end = len(path)
			}
			key, path = path[:end], path[end:]
		}
		path = strings.TrimPrefix(path, ".")
		child := l.child(key)
		if child == nil {
			return l
		}
		l.node = child
	}
	return l
}

// child is the element or the value named by key. A value on a line of its own
// begins after its key; a mapping or sequence is then where the key is.
func (l location) child(key string) *yaml.Node {
	node := l.node
	if node.Kind == yaml.AliasNode {
		node = node.Alias
	}
	switch node.Kind {
	case yaml.SequenceNode:
		if i, err := strconv.Atoi(key); err == nil && i >= 0 && i < len(node.Content) {
			return node.Content[i]
		}
	case yaml.MappingNode:
		for i := 0; i+1 < len(node.Content); i += 2 {
			if node.Content[i].Value == key {
				value := *node.Content[i+1]
				value.Line = node.Content[i].Line
				return &value
			}
		}
	}
	return nil
}

// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package filter

import (
	"errors"
	"fmt"
	"regexp"
	"strings"

	flowpb "github.com/cilium/cilium/api/v1/flow"
	"k8s.io/apimachinery/pkg/labels"
)

// name of an object: its namespace, and what its name begins with.
type name struct{ namespace, prefix string }

// parseName reads "namespace/prefix", "namespace/" or "/prefix"; a prefix
// without namespace is one in the namespace default.
func parseName(text string) (name, error) {
	if text == "" {
		return name{}, errors.New("must not be empty")
	}
	namespace, prefix, ok := strings.Cut(text, "/")
	if !ok {
		return name{"default", text}, nil
	}
	prefix, _, _ = strings.Cut(prefix, "/")
	return name{namespace, prefix}, nil
}

func (n name) matches(namespace, of string) bool {
	return (namespace != "" || of != "") && (n.namespace == "" || n.namespace == namespace) && strings.HasPrefix(of, n.prefix)
}

// domain is what stands for any domain name.
const domain = `(?:[-0-9_a-z]+(?:\.[-0-9_a-z]+)*)`

// domainPattern reads a domain name in which * stands for any characters.
func domainPattern(text string) (*regexp.Regexp, error) {
	expression, err := domainExpression(text)
	if err != nil {
		return nil, err
	}
	return regexp.Compile(`\A` + expression + `\z`)
}

func domainExpression(text string) (string, error) {
	text = strings.ToLower(strings.TrimSuffix(strings.TrimSpace(text), "."))
	switch {
	case text == "":
		return "", errors.New("empty pattern")
	case strings.HasSuffix(text, "."):
		return "", errors.New("several trailing dots in pattern")
	}
	var b strings.Builder
	for _, r := range text {
		switch {
		case r == '.':
			b.WriteString(`\.`)
		case r == '*':
			b.WriteString(`[-.0-9a-z]*`)
		case r == '-' || r == '_' || '0' <= r && r <= '9' || 'a' <= r && r <= 'z':
			b.WriteRune(r)
		default:
			return "", fmt.Errorf("%q in pattern", r)
		}
	}
	return b.String(), nil
}

// defaultCluster is the name of a cluster that has not been given one.
const defaultCluster = "default"

// nodeNames matches nodes by patterns: "node", "cluster/" or "cluster/node".
func nodeNames(texts []string) (Func, error) {
	return parsed(texts, nodePattern, func(f *flowpb.Flow, pattern *regexp.Regexp) bool {
		name := f.GetNodeName()
		if name == "" {
			return false
		}
		if !strings.Contains(name, "/") {
			name = defaultCluster + "/" + name
		}
		return pattern.MatchString(name)
	})
}

func nodePattern(text string) (*regexp.Regexp, error) {
	if text == "" {
		return nil, errors.New("empty pattern")
	}
	cluster, node, ok := strings.Cut(text, "/")
	if !ok {
		cluster, node = "", text
	}
	if strings.Contains(node, "/") {
		return nil, errors.New("several slashes in pattern")
	}
	parts := []string{cluster, node}
	for i, part := range parts {
		if parts[i] = domain; part == "" {
			continue
		}
		var err error
		if parts[i], err = domainExpression(part); err != nil {
			return nil, err
		}
	}
	return regexp.Compile(`\A` + parts[0] + "/" + parts[1] + `\z`)
}

// selectors matches labels like "k8s:app=web", in which the part before the
// colon is their source. Keys of a selector without one are of any source.
func selectors(texts []string, get func(*flowpb.Flow) []string) (Func, error) {
	return parsed(texts, parseSelector, func(f *flowpb.Flow, s labels.Selector) bool { return s.Matches(labelSet(get(f))) })
}

// anySource stands for all sources of labels.
const anySource = "any"

// parseSelector reads a selector of Kubernetes. Its keys may have a colon, which
// such selectors may not: a dot stands for it.
func parseSelector(text string) (labels.Selector, error) {
	var b strings.Builder
	for i, requirement := range requirements(text) {
		if i > 0 {
			b.WriteByte(',')
		}
		key := strings.TrimLeft(requirement, "! \t")
		b.WriteString(requirement[:len(requirement)-len(key)])
		end := strings.IndexAny(key, " \t=!,")
		if end < 0 {
			end = len(key)
		}
		if source, rest, ok := strings.Cut(key[:end], ":"); ok {
			b.WriteString(source + "." + rest)
		} else if end > 0 {
			b.WriteString(anySource + "." + key[:end])
		}
		b.WriteString(key[end:])
	}
	return labels.Parse(b.String())
}

// requirements of a selector: what commas separate that are not in brackets.
func requirements(text string) (out []string) {
	depth, start := 0, 0
	for i, r := range text {
		switch {
		case r == '(':
			depth++
		case r == ')':
			depth--
		case r == ',' && depth == 0:
			out = append(out, text[start:i])
			start = i + 1
		}
	}
	return append(out, text[start:])
}

// labelSet has each label under its source and under [anySource].
func labelSet(texts []string) labels.Set {
	out := make(labels.Set, 2*len(texts))
	for _, text := range texts {
		key, value, _ := strings.Cut(text, "=")
		source, key, ok := strings.Cut(key, ":")
		if !ok {
			source, key = "unspec", source
		}
		out[source+"."+key] = value
		if _, taken := out[anySource+"."+key]; !taken {
			out[anySource+"."+key] = value
		}
	}
	return out
}

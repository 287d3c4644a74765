// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package manifest

import (
	"encoding/json"
	"errors"
	"strconv"
	"strings"

	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/validation/field"
	kjson "sigs.k8s.io/json"

	"github.com/podgate/podgate/bpf/policy"
)

// counted is how many unknown fields the decoder tells of.
const counted = 100

// PolicyFromJSON translates a NetworkPolicy that may have fields this version
// of podgate does not know, as an API server of a later one does. Such a field
// may stand for a restriction. So a rule that has one matches nothing, a
// podSelector that has one selects every pod of the namespace, and with one
// elsewhere in the spec no rule matches anything and both directions are
// isolated. All of that holds for a policy with a hundred of them.
//
// The error is an [*InvalidError], and the object is as that of [Translate]; or
// it says that this is no JSON of an object with a name.
func PolicyFromJSON(raw []byte) (Object, error) {
	np := &networkingv1.NetworkPolicy{}
	unknown, err := kjson.UnmarshalStrict(raw, np, kjson.DisallowUnknownFields)
	if err != nil {
		return undecodable(raw, err)
	}
	out, err := Policy(np)
	var faults field.ErrorList
	for _, u := range unknown {
		var where kjson.FieldError
		if !errors.As(u, &where) || !strings.HasPrefix(where.FieldPath(), "spec.") {
			continue
		}
		restrict(&out, where.FieldPath())
		faults = append(faults, field.Forbidden(field.NewPath(where.FieldPath()), "this version of podgate does not know the field"))
	}
	if len(unknown) >= counted {
		restrict(&out, "spec.podSelector.")
		restrict(&out, "spec.")
	}
	object := Object{Key: Key{KindNetworkPolicy, out.Namespace, out.Name}, Policy: &out}
	var invalid *InvalidError
	switch {
	case len(faults) == 0:
		return object, err
	case errors.As(err, &invalid):
		faults = append(invalid.Fields, faults...)
	}
	return object, &InvalidError{KindNetworkPolicy, out.Namespace, out.Name, faults}
}

// restrict takes from a policy what a field that is not understood may take.
func restrict(p *policy.Policy, path string) {
	if strings.HasPrefix(path, "spec.podSelector.") {
		p.Subject.Pods = nil
		return
	}
	for d, name := range map[policy.Direction]string{policy.Ingress: "spec.ingress[", policy.Egress: "spec.egress["} {
		rest, ok := strings.CutPrefix(path, name)
		if !ok {
			continue
		}
		number, _, _ := strings.Cut(rest, "]")
		// Rules of a direction that is not isolated were left out.
		if i, err := strconv.Atoi(number); err == nil && i < len(p.Rules[d]) {
			p.Rules[d][i] = nothing(p.Rules[d][i])
		}
		return
	}
	for d := range p.Rules {
		p.Isolates[d] = true
		for i, r := range p.Rules[d] {
			p.Rules[d][i] = nothing(r)
		}
	}
}

// nothing is a rule that matches nothing.
func nothing(r policy.Rule) policy.Rule { return policy.Rule{Action: policy.Allow, Text: r.Text} }

// undecodable is what a policy closes of which no more than the name can be
// read: all pods of its namespace.
func undecodable(raw []byte, cause error) (Object, error) {
	var head struct {
		Metadata struct{ Namespace, Name, UID string }
	}
	if err := json.Unmarshal(raw, &head); err != nil || head.Metadata.Name == "" {
		return Object{}, cause
	}
	np := &networkingv1.NetworkPolicy{ObjectMeta: metav1.ObjectMeta{Namespace: head.Metadata.Namespace, Name: head.Metadata.Name}}
	p, err := Policy(np)
	if err != nil {
		return Object{}, err
	}
	if head.Metadata.UID != "" {
		p.UID = head.Metadata.UID
	}
	p.Isolates = [2]bool{true, true}
	return Object{Key: Key{KindNetworkPolicy, p.Namespace, p.Name}, Policy: &p}, &InvalidError{
		KindNetworkPolicy, p.Namespace, p.Name, field.ErrorList{field.Invalid(field.NewPath("spec"), "", decodeReason(cause))},
	}
}

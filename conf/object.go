// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package conf

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
)

// The two ways in which configuration is wrong. CNI has an error code for each.
var (
	ErrDecode  = errors.New("not a JSON object")
	ErrInvalid = errors.New("invalid configuration")
)

// object maps the keys that a JSON object may have to where their values go;
// nil for keys that are somebody else's.
//
// encoding/json alone would match keys in any case, not say which key a custom
// type failed at, and stop at the first fault.
type object map[string]any

func (o object) add(more object) { maps.Copy(o, more) }

// decode reads b into the targets of o. Keys with the cni.dev/ prefix are
// reserved to the specification and never unknown.
func (o object) decode(b []byte) error {
	var raw map[string]json.RawMessage
	if err := json.Unmarshal(b, &raw); err != nil {
		return fmt.Errorf("%w: %w", ErrDecode, err)
	}
	var wrong faults
	for _, key := range slices.Sorted(maps.Keys(raw)) {
		target, known := o[key]
		switch {
		case !known && !strings.HasPrefix(key, "cni.dev/"):
			wrong = append(wrong, fmt.Sprintf("%s: unknown key", key))
		case target != nil:
			if err := json.Unmarshal(raw[key], target); err != nil {
				wrong = append(wrong, fmt.Sprintf("%s: %s", key, reason(err)))
			}
		}
	}
	if len(wrong) > 0 {
		return wrong
	}
	return nil
}

// faults is what is wrong with the keys of an object, one text each.
type faults []string

func (f faults) Error() string        { return strings.Join(f, "; ") }
func (f faults) Is(target error) bool { return target == ErrInvalid }

// reason is err without the names of Go types.
func reason(err error) string {
	var t *json.UnmarshalTypeError
	if !errors.As(err, &t) {
		return err.Error()
	}
	if t.Field != "" {
		return fmt.Sprintf("%s: a JSON %s does not fit", t.Field, t.Value)
	}
	return fmt.Sprintf("a JSON %s does not fit", t.Value)
}

func (g *Gate) keys() object {
	return object{
		"mode":          &g.Mode,
		"waitForPolicy": &g.WaitForPolicy,
		"attach":        &g.Attach,
		"antiSpoof":     &g.AntiSpoof,
		"audit":         &g.Audit,
		"nonVeth":       &g.NonVeth,
	}
}

func (i *Instance) keys() object {
	return object{
		"bpffs":    (*absolutePath)(&i.BPFFS),
		"instance": (*pinName)(&i.Instance),
		"capacity": &i.Capacity,
	}
}

func (l *Log) keys() object {
	return object{"logLevel": (*level)(&l.LogLevel), "logFile": (*absolutePath)(&l.LogFile)}
}

// UnmarshalJSON reads a capacity object. Unknown keys are errors.
func (c *Capacity) UnmarshalJSON(b []byte) error {
	return object{
		"endpoints":  &c.Endpoints,
		"flows":      &c.Flows,
		"peers":      &c.Peers,
		"blocks":     &c.Blocks,
		"cells":      &c.Cells,
		"rules":      &c.Rules,
		"services":   &c.Services,
		"fragments":  &c.Fragments,
		"eventBytes": (*ringSize)(&c.EventBytes),
	}.decode(b)
}

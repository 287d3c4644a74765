// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package conflist

import (
	"bytes"
	"encoding/json"
	"fmt"
)

// span is where a JSON value is in the bytes of a file.
type span struct{ start, end int }

func (s span) of(b []byte) []byte { return b[s.start:s.end] }

func (s span) shift(by int) span { return span{s.start + by, s.end + by} }

// member finds the value of a key of the object b. Of a key that is there twice
// the last one counts, as it does for encoding/json and thus for libcni.
func member(b []byte, key string) (found span, ok bool, err error) {
	d := json.NewDecoder(bytes.NewReader(b))
	if err := delimiter(d, '{'); err != nil {
		return span{}, false, err
	}
	for d.More() {
		name, err := d.Token()
		if err != nil {
			return span{}, false, err
		}
		value, err := next(d)
		if err != nil {
			return span{}, false, err
		}
		if name == key {
			found, ok = value, true
		}
	}
	return found, ok, nil
}

// elements finds the values of the array b.
func elements(b []byte) ([]span, error) {
	d := json.NewDecoder(bytes.NewReader(b))
	if err := delimiter(d, '['); err != nil {
		return nil, err
	}
	var all []span
	for d.More() {
		value, err := next(d)
		if err != nil {
			return nil, err
		}
		all = append(all, value)
	}
	return all, nil
}

// next is where the decoder's next value is, which it moves behind.
func next(d *json.Decoder) (span, error) {
	var raw json.RawMessage
	if err := d.Decode(&raw); err != nil {
		return span{}, err
	}
	end := int(d.InputOffset())
	return span{end - len(raw), end}, nil
}

func delimiter(d *json.Decoder, want json.Delim) error {
	got, err := d.Token()
	if err != nil {
		return err
	}
	if got != want {
		return fmt.Errorf("found %v, want %v", got, want)
	}
	return nil
}

// same tells whether two JSON values mean the same.
func same(a, b []byte) bool {
	var x, y any
	if json.Unmarshal(a, &x) != nil || json.Unmarshal(b, &y) != nil {
		return false
	}
	// Maps are marshalled with their keys sorted.
	p, errP := json.Marshal(x)
	q, errQ := json.Marshal(y)
	return errP == nil && errQ == nil && bytes.Equal(p, q)
}

// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package pinning

import (
	"encoding/json"
	"errors"
	"fmt"
	"iter"
	"net"
	"net/netip"
	"time"

	"github.com/cilium/ebpf"

	"github.com/podgate/podgate/bpf"
	"github.com/podgate/podgate/bpf/policy"
)

// AttachmentKey names a CNI attachment (CNI spec 1.1.0, "Attachment").
type AttachmentKey struct {
	ContainerID string `json:"containerID"`
	IfName      string `json:"ifname"`
}

func (k AttachmentKey) String() string { return k.ContainerID + "/" + k.IfName }

func (k AttachmentKey) wire() (bpf.DatapathAttachment, error) {
	var a bpf.DatapathAttachment
	if k.ContainerID == "" || k.IfName == "" {
		return a, fmt.Errorf("%w: attachment %q without container ID or interface name", ErrInvalid, k)
	}
	return a, errors.Join(
		setText(a.ContainerId[:], "container ID", k.ContainerID),
		setText(a.Ifname[:], "interface name", k.IfName))
}

func attachmentKey(a *bpf.DatapathAttachment) AttachmentKey {
	return AttachmentKey{text(a.ContainerId[:]), text(a.Ifname[:])}
}

// AttachKind is how programs are attached to an interface.
type AttachKind uint8

// AttachAuto chooses clsact unless the interface has an ingress qdisc or will
// get one, which excludes it.
const (
	AttachAuto AttachKind = iota
	AttachClsact
	AttachTCX
	// AttachFormer: its hooks are those of another version still.
	AttachFormer
)

func (k AttachKind) String() string {
	switch k {
	case AttachClsact:
		return "clsact"
	case AttachTCX:
		return "tcx"
	case AttachFormer:
		return "former version"
	default:
		return "auto"
	}
}

// MarshalText gives the name of the kind.
func (k AttachKind) MarshalText() ([]byte, error) { return []byte(k.String()), nil }

// Mode is what an endpoint's gate does until its policy is known.
type Mode uint8

// ModeClosed lets only the pod's own node in and out.
const (
	ModeClosed Mode = iota
	ModeOpen
)

func (m Mode) String() string {
	if m == ModeOpen {
		return "open"
	}
	return "closed"
}

// MarshalText gives the name of the mode.
func (m Mode) MarshalText() ([]byte, error) { return []byte(m.String()), nil }

func (m Mode) enforcement() Enforcement {
	if m == ModeOpen {
		return Enforcement{RulesetOpen, RulesetOpen}
	}
	return Enforcement{RulesetClosed, RulesetClosed}
}

// Endpoint is the record of one CNI attachment.
type Endpoint struct {
	// Key is the container and the interface in it.
	Key AttachmentKey `json:"attachment"`
	// CNIIfName is the CNI_IFNAME of the attachment that the interface came
	// with; empty means Key.IfName. An attachment may have several interfaces.
	CNIIfName string `json:"cniIfname,omitempty"`
	// Interfaces is how many the attachment has that are gated; zero means that
	// nobody knows.
	Interfaces int `json:"interfaces,omitempty"`
	// ID is never reused, Gate is the slot in the gates map.
	ID   uint32 `json:"id"`
	Gate uint32 `json:"gate"`
	// HostIfindex is the host end of the veth.
	HostIfindex int `json:"hostIfindex"`
	// MAC and Addresses of the pod's end, link-local ones included.
	MAC       net.HardwareAddr `json:"mac"`
	Addresses []netip.Addr     `json:"addresses"`
	// Network is the name of the CNI network, NetNS the path ADD was given.
	Network string `json:"network"`
	NetNS   string `json:"netns"`
	// Pod identity from CNI_ARGS; empty for containers without pods.
	PodUID       string `json:"podUID,omitempty"`
	PodNamespace string `json:"podNamespace,omitempty"`
	PodName      string `json:"podName,omitempty"`
	// Labels of args.cni.labels.
	Labels map[string]string `json:"labels,omitempty"`
	// Pod is the subject whose rulesets the gate follows.
	Pod       policy.PodKey `json:"pod"`
	AntiSpoof bool          `json:"antiSpoof"`
	Audit     bool          `json:"audit"`
	Mode      Mode          `json:"mode"`
	Attach    AttachKind    `json:"attach"`
	Created   time.Time     `json:"created"`
}

// attachment is what the runtime calls the endpoint's attachment.
func (e *Endpoint) attachment() AttachmentKey {
	if e.CNIIfName == "" {
		return e.Key
	}
	return AttachmentKey{e.Key.ContainerID, e.CNIIfName}
}

// podKey is the subject that an endpoint follows until someone knows better:
// the pod's UID, its name, or the container.
func (e *Endpoint) podKey() policy.PodKey {
	switch {
	case e.Pod != "":
		return e.Pod
	case e.PodUID != "":
		return policy.PodKey(e.PodUID)
	case e.PodName != "":
		return policy.PodKey(e.PodNamespace + "/" + e.PodName)
	default:
		return policy.PodKey(e.Key.ContainerID)
	}
}

func (e *Endpoint) flags() uint16 {
	var f uint16
	if e.AntiSpoof {
		f |= uint16(bpf.DatapathGateFlagsGATE_ANTI_SPOOF)
	}
	if e.Audit {
		f |= uint16(bpf.DatapathGateFlagsGATE_AUDIT)
	}
	return f
}

func (e *Endpoint) wire() (*bpf.DatapathEndpoint, error) {
	w := &bpf.DatapathEndpoint{
		Id: e.ID, Gate: e.Gate, Ifindex: uint32(e.HostIfindex),
		Mode: uint8(e.Mode), Attach: uint8(e.Attach), Flags: e.flags(),
		AddressesCount: uint16(len(e.Addresses)), Interfaces: uint32(e.Interfaces),
		CreatedNs: uint64(e.Created.UnixNano()),
	}
	if len(e.MAC) != len(w.Mac) {
		return nil, fmt.Errorf("%w: MAC address %q", ErrInvalid, e.MAC)
	}
	copy(w.Mac[:], e.MAC)
	if len(e.Addresses) > len(w.Addresses) {
		return nil, fmt.Errorf("%w: %d addresses, %d are the most", ErrInvalid, len(e.Addresses), len(w.Addresses))
	}
	for i, a := range e.Addresses {
		w.Addresses[i] = wire(a)
	}
	labels := []byte(nil)
	if len(e.Labels) > 0 {
		var err error
		if labels, err = json.Marshal(e.Labels); err != nil {
			return nil, fmt.Errorf("labels: %w", err)
		}
	}
	return w, errors.Join(
		setText(w.CniIfname[:], "CNI_IFNAME", e.attachment().IfName),
		setText(w.Network[:], "network name", e.Network),
		setText(w.Netns[:], "network namespace path", e.NetNS),
		setText(w.PodUid[:], "pod UID", e.PodUID),
		setText(w.PodNamespace[:], "pod namespace", e.PodNamespace),
		setText(w.PodName[:], "pod name", e.PodName),
		setText(w.PodKey[:], "pod key", string(e.Pod)),
		setText(w.Labels[:], "labels", string(labels)))
}

func unwireEndpoint(k *bpf.DatapathAttachment, w *bpf.DatapathEndpoint) (Endpoint, error) {
	e := Endpoint{
		Key: attachmentKey(k), ID: w.Id, Gate: w.Gate, HostIfindex: int(w.Ifindex),
		MAC:       net.HardwareAddr(append([]byte(nil), w.Mac[:]...)),
		CNIIfName: text(w.CniIfname[:]), Interfaces: int(w.Interfaces),
		Network: text(w.Network[:]), NetNS: text(w.Netns[:]),
		PodUID: text(w.PodUid[:]), PodNamespace: text(w.PodNamespace[:]), PodName: text(w.PodName[:]),
		Pod:       policy.PodKey(text(w.PodKey[:])),
		AntiSpoof: w.Flags&uint16(bpf.DatapathGateFlagsGATE_ANTI_SPOOF) != 0,
		Audit:     w.Flags&uint16(bpf.DatapathGateFlagsGATE_AUDIT) != 0,
		Mode:      Mode(w.Mode), Attach: AttachKind(w.Attach),
		Created: time.Unix(0, int64(w.CreatedNs)).UTC(),
	}
	if int(w.AddressesCount) > len(w.Addresses) {
		// Whoever cleans up releases what is there.
		for _, a := range w.Addresses {
			if a != (bpf.DatapathAddress{}) {
				e.Addresses = append(e.Addresses, unwire(a))
			}
		}
		return e, fmt.Errorf("endpoint %s: %w: %d addresses", e.Key, ErrInvalid, w.AddressesCount)
	}
	for _, a := range w.Addresses[:w.AddressesCount] {
		e.Addresses = append(e.Addresses, unwire(a))
	}
	if labels := text(w.Labels[:]); labels != "" {
		if err := json.Unmarshal([]byte(labels), &e.Labels); err != nil {
			return e, fmt.Errorf("endpoint %s: labels: %w", e.Key, err)
		}
	}
	return e, nil
}

// Endpoint returns the record of an attachment and what is enforced on it, or
// [ErrNotFound].
func (s *State) Endpoint(k AttachmentKey) (Endpoint, Enforcement, error) {
	key, err := k.wire()
	if err != nil {
		return Endpoint{}, Enforcement{}, err
	}
	m, err := s.m(bpf.DatapathMapEndpoints)
	if err != nil {
		return Endpoint{}, Enforcement{}, err
	}
	var w bpf.DatapathEndpoint
	if err := m.Lookup(&key, &w); errors.Is(err, ebpf.ErrKeyNotExist) {
		return Endpoint{}, Enforcement{}, fmt.Errorf("endpoint %s: %w", k, ErrNotFound)
	} else if err != nil {
		return Endpoint{}, Enforcement{}, fmt.Errorf("endpoint %s: %w", k, err)
	}
	e, err := unwireEndpoint(&key, &w)
	if err != nil {
		return e, Enforcement{}, err
	}
	enforced, err := s.Enforcement(e)
	return e, enforced, err
}

// Enforcement is what is enforced on an endpoint now.
func (s *State) Enforcement(e Endpoint) (Enforcement, error) {
	sh, err := s.memory()
	if err != nil {
		return Enforcement{}, err
	}
	if e.Gate >= uint32(len(sh.gates)) || sh.gates[e.Gate].Endpoint != e.ID {
		return Enforcement{}, fmt.Errorf("endpoint %s: %w: gate %d is not its own", e.Key, ErrDiffers, e.Gate)
	}
	return sh.enforcement(e.Gate), nil
}

// Audited reports whether an endpoint is in audit mode now: by its own setting
// or by its pod's.
func (s *State) Audited(e Endpoint) (bool, error) {
	if _, err := s.Enforcement(e); err != nil {
		return false, err
	}
	return s.shared.gates[e.Gate].Flags&uint16(bpf.DatapathGateFlagsGATE_AUDIT) != 0, nil
}

// Endpoints yields every endpoint's record. An endpoint added meanwhile may be
// missed; a record that cannot be read is yielded with an error.
func (s *State) Endpoints() iter.Seq2[Endpoint, error] {
	return func(yield func(Endpoint, error) bool) {
		m, err := s.m(bpf.DatapathMapEndpoints)
		if err != nil {
			yield(Endpoint{}, err)
			return
		}
		for k, w := range each[bpf.DatapathAttachment, bpf.DatapathEndpoint](m, &err) {
			if !yield(unwireEndpoint(&k, &w)) {
				return
			}
		}
		if err != nil {
			yield(Endpoint{}, err)
		}
	}
}

// each walks a hash that others may change meanwhile. The keys are gathered
// first, so that removing entries on the way is safe.
func each[K comparable, V any](m *ebpf.Map, failed *error) iter.Seq2[K, V] {
	return func(yield func(K, V) bool) {
		keys, err := keysOf[K](m)
		if err != nil {
			*failed = err
			return
		}
		for _, k := range keys {
			var v V
			if err := m.Lookup(&k, &v); errors.Is(err, ebpf.ErrKeyNotExist) {
				continue
			} else if err != nil {
				*failed = fmt.Errorf("read %s: %w", m, err)
				return
			}
			if !yield(k, v) {
				return
			}
		}
	}
}

// keysOf lists a hash's keys. Removal of the key the walk stands on starts the
// kernel's walk over, so keys may be met twice. A walk that is started over
// for ever is an error: what it has met by then need not be all.
func keysOf[K comparable](m *ebpf.Map) ([]K, error) {
	var keys []K
	seen := map[K]struct{}{}
	var prev any
	most := 4*uint64(m.MaxEntries()) + 16
	for range most {
		var next K
		if err := m.NextKey(prev, &next); errors.Is(err, ebpf.ErrKeyNotExist) {
			return keys, nil
		} else if err != nil {
			return nil, fmt.Errorf("walk %s: %w", m, err)
		}
		if _, dup := seen[next]; !dup {
			seen[next] = struct{}{}
			keys = append(keys, next)
		}
		prev = &next
	}
	return nil, fmt.Errorf("walk %s: entries were removed faster than read: no end after %d steps", m, most)
}

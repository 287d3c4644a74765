// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package conf

import (
	"encoding/json"
	"fmt"
	"log/slog"
	"net"
	"time"

	"github.com/containernetworking/cni/pkg/types"
)

// NetConf is podgate-cni's object in a network configuration list, as the
// runtime completes it for one call (CNI specification 1.1, section 2).
type NetConf struct {
	// CNIVersion and Name are those of the list.
	CNIVersion, Name string
	// PrevResult is the result of the plugins before us, as it came; nil when
	// there was none.
	PrevResult json.RawMessage
	// Runtime is what the runtime passed through capabilities.
	Runtime Runtime
	// Labels are args.cni.labels, the convention for runtimes that have no
	// pods. Never nil.
	Labels map[string]string
	// Valid are the attachments to keep on GC.
	Valid Attachments

	Gate
	Instance
	Log
}

// Gate says how an attachment is gated.
type Gate struct {
	// Mode (key "mode") is what a gate does until its policy is known:
	// "closed" drops everything but the node's own traffic, "open" allows
	// everything.
	Mode Mode
	// WaitForPolicy (key "waitForPolicy", a Go duration, 0s to [MaxWait]) is
	// how long ADD may wait for the pod's policy to be published before the
	// gate goes into Mode.
	WaitForPolicy Duration
	// Attach (key "attach") is the kind of kernel hook: "auto", "clsact", "tcx".
	Attach Attach
	// AntiSpoof (key "antiSpoof") drops what the pod sends from an address or
	// MAC that is not its own.
	AntiSpoof bool
	// Audit (key "audit") lets through what policy would deny, and says so.
	Audit bool
	// NonVeth (key "nonVeth") is what ADD does with an interface that has no
	// host-side veth, such as ipvlan, macvlan or a moved host device: "error"
	// or "skip".
	NonVeth NonVeth
}

// Instance is the pinned state that an attachment belongs to.
type Instance struct {
	// BPFFS (key "bpffs") is where the BPF file system is, or is to be,
	// mounted: an absolute path.
	BPFFS string
	// Instance (key "instance") is the directory below BPFFS. Instances do
	// not share state.
	Instance string
	// Capacity (key "capacity") counts only when this call is the first to
	// make the instance.
	Capacity Capacity
}

// Log says what is logged and where. CNI reserves stdout for results.
type Log struct {
	// LogLevel (key "logLevel"): "debug", "info", "warn" or "error".
	LogLevel slog.Level
	// LogFile (key "logFile") is an absolute path to append to; stderr when
	// empty.
	LogFile string
}

// Capacity is the number of entries of each kind that the kernel maps hold.
// Zero leaves a number to the instance's default.
type Capacity struct {
	// Endpoints gated on the node, one for each attachment.
	Endpoints uint32
	// Flows tracked at once; the oldest make room for new ones.
	Flows uint32
	// Peers: pod addresses that a policy tells from "everyone else".
	Peers uint32
	// Blocks: address ranges that a policy names.
	Blocks uint32
	// Cells: pairs of a ruleset and a peer class.
	Cells uint32
	// Rules, for attribution and counters.
	Rules uint32
	// Services: addresses with a port at which Services are reached.
	Services uint32
	// Fragments: fragmented packets in flight.
	Fragments uint32
	// EventBytes is the size of the event ring buffer in bytes: a power of
	// two, at least a page.
	EventBytes uint32
}

// Runtime is what podgate needs to know of the runtimeConfig.
type Runtime struct {
	// MAC that a neighbour in the chain (tuning) gives the pod interface; nil
	// when the runtime did not ask for one.
	MAC net.HardwareAddr
	// Bandwidth tells that the bandwidth plugin will put an ingress qdisc on
	// the host veth, next to which clsact cannot be.
	Bandwidth bool
}

// Attachments is a list that may be absent, which on GC means something else
// than empty: absent keeps everything, empty keeps nothing.
type Attachments struct {
	Given bool
	List  []types.GCAttachment
}

// MaxWait is the longest WaitForPolicy: runtimes give up on a pod after two to
// four minutes, of which other plugins need their share.
const MaxWait = time.Minute

// Defaults is a NetConf of which every key is absent.
func Defaults() *NetConf {
	return &NetConf{
		Labels: map[string]string{},
		Gate: Gate{
			Mode:      ModeClosed,
			Attach:    AttachAuto,
			AntiSpoof: true,
			NonVeth:   NonVethError,
		},
		Instance: Instance{BPFFS: "/sys/fs/bpf", Instance: "podgate"},
		Log:      Log{LogLevel: slog.LevelWarn},
	}
}

// Parse reads podgate-cni's object. It fails with [ErrDecode] when b is not a
// JSON object and with [ErrInvalid] when a key is unknown or its value does not
// fit; the error then names every such key.
func Parse(b []byte) (*NetConf, error) {
	c := Defaults()
	keys := object{
		"cniVersion":                &c.CNIVersion,
		"name":                      &c.Name,
		"prevResult":                &c.PrevResult,
		"runtimeConfig":             &c.Runtime,
		"args":                      (*args)(&c.Labels),
		"cni.dev/valid-attachments": &c.Valid,
		"cni.dev/attachments":       &c.Valid, // the same list by its name in earlier texts

		"cniVersions":  nil,
		"type":         nil,
		"capabilities": nil,
		"ipMasq":       nil,
		"ipam":         nil,
		"dns":          nil,
	}
	keys.add(c.Gate.keys())
	keys.add(c.Instance.keys())
	keys.add(c.Log.keys())
	if err := keys.decode(b); err != nil {
		return nil, fmt.Errorf("podgate-cni: %w", err)
	}
	return c, nil
}

// IPAM is the ipam object of a main plugin whose IPAM is podgate-ipam.
type IPAM struct {
	// Delegate (key "delegate") is the ipam object of the IPAM plugin that
	// does the work, with all its keys; DelegateType is its type.
	Delegate     json.RawMessage
	DelegateType string

	Instance
	Log
}

// ParseIPAM reads a main plugin's whole object and podgate-ipam's ipam object
// in it. Errors are those of [Parse]; the keys of the main plugin are not
// looked at.
func ParseIPAM(b []byte) (*IPAM, error) {
	d := Defaults()
	c := &IPAM{Instance: d.Instance, Log: d.Log}
	var outer struct {
		IPAM json.RawMessage `json:"ipam"`
	}
	if err := json.Unmarshal(b, &outer); err != nil {
		return nil, fmt.Errorf("podgate-ipam: %w: %w", ErrDecode, err)
	}
	if outer.IPAM == nil {
		return nil, fmt.Errorf("podgate-ipam: %w: ipam: missing", ErrInvalid)
	}
	keys := object{"type": nil, "delegate": (*delegate)(c)}
	keys.add(c.Instance.keys())
	keys.add(c.Log.keys())
	if err := keys.decode(outer.IPAM); err != nil {
		return nil, fmt.Errorf("podgate-ipam: ipam: %w", err)
	}
	if c.DelegateType == "" {
		return nil, fmt.Errorf("podgate-ipam: ipam: %w: delegate: missing, want the ipam object of another plugin", ErrInvalid)
	}
	return c, nil
}

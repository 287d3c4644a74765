// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package pinning

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/pin"
	"golang.org/x/sys/unix"

	"github.com/podgate/podgate/bpf"
)

// Options of [Ensure] and [Open].
type Options struct {
	Layout   Layout
	Capacity Capacity
	Logger   *slog.Logger
	// LockTimeout bounds the wait for other processes; 5 s.
	LockTimeout time.Duration
	// NoMount has [Ensure] fail where no BPF file system is mounted: one that is
	// mounted in a container is there for nobody else.
	NoMount bool
}

func (o Options) withDefaults() (Options, error) {
	o.Layout = o.Layout.withDefaults()
	o.Capacity = o.Capacity.withDefaults()
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.LockTimeout == 0 {
		o.LockTimeout = 5 * time.Second
	}
	return o, errors.Join(o.Layout.validate(), o.Capacity.validate())
}

// State is an instance's pinned state. One goroutine at a time may use it.
type State struct {
	layout      Layout
	log         *slog.Logger
	lockTimeout time.Duration
	// private states are not pinned: nobody else sees them, no lock is needed.
	private bool

	opened   map[string]*ebpf.Map
	programs map[string]*ebpf.Program
	shared   *shared
	applied  *applied
	services *services
	// noAfterNAT is why this kernel cannot have after_nat.
	noAfterNAT error
	// prepared is after_nat, not pinned yet.
	prepared *ebpf.Program

	// watches read shared memory until they are stopped.
	watches     sync.WaitGroup
	stopWatches []context.CancelFunc
}

// programNames by direction: index 0 judges ingress, 1 egress.
func programNames() [2]string { return [2]string{bpf.DatapathProgToPod, bpf.DatapathProgFromPod} }

// unpinned maps live and die with the programs that use them.
func unpinned(name string) bool {
	return name == bpf.DatapathMapScratches || len(name) > 0 && name[0] == '.'
}

// Open adopts an instance. It returns [ErrNotInstalled] when there is none.
// Maps are opened when they are first used, so that a CNI verb pays only for
// what it needs.
func Open(_ context.Context, o Options) (*State, error) {
	o, err := o.withDefaults()
	if err != nil {
		return nil, err
	}
	if _, err := os.Stat(o.Layout.VersionDir()); errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%w: no %s", ErrNotInstalled, o.Layout.VersionDir())
	} else if err != nil {
		return nil, fmt.Errorf("open instance: %w", err)
	}
	return newState(o), nil
}

func newState(o Options) *State {
	return &State{
		layout: o.Layout, log: o.Logger, lockTimeout: o.LockTimeout,
		opened: map[string]*ebpf.Map{}, programs: map[string]*ebpf.Program{},
	}
}

// Ensure makes the instance, or adopts it and checks that its maps have the
// layout this binary knows ([ErrABI] if not). A BPF file system is mounted if
// there is none at the layout's mount point.
func Ensure(ctx context.Context, o Options) (*State, error) {
	o, err := o.withDefaults()
	if err != nil {
		return nil, err
	}
	if o.NoMount {
		if is, err := isBPFFS(o.Layout.BPFFS); err != nil {
			return nil, err
		} else if !is {
			return nil, fmt.Errorf("%w at %s", ErrNoBPFFS, o.Layout.BPFFS)
		}
	} else if err := mountBPFFS(ctx, o.Layout.BPFFS, o.LockTimeout); err != nil {
		return nil, err
	}
	if err := os.Mkdir(o.Layout.Dir(), 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, fmt.Errorf("make instance: %w", err)
	}
	l, err := acquire(ctx, o.Layout.Dir(), o.LockTimeout)
	if err != nil {
		return nil, err
	}
	defer func() { _ = l.release() }()

	s := newState(o)
	if _, err := os.Stat(o.Layout.VersionDir()); errors.Is(err, fs.ErrNotExist) {
		if err := s.install(o.Capacity); err != nil {
			return nil, err
		}
		s.log.Info("instance made", "dir", o.Layout.VersionDir())
		return s, nil
	} else if err != nil {
		return nil, fmt.Errorf("adopt instance: %w", err)
	}
	if err := s.verify(); err != nil {
		return nil, errors.Join(err, s.Close())
	}
	s.reportCapacity(o.Capacity)
	return s, nil
}

// Close releases what the process holds; nothing pinned changes.
func (s *State) Close() error {
	for _, stop := range s.stopWatches {
		stop()
	}
	s.watches.Wait()
	var errs []error
	for _, m := range s.opened {
		errs = append(errs, m.Close())
	}
	for _, p := range s.programs {
		errs = append(errs, p.Close())
	}
	if s.prepared != nil {
		errs = append(errs, s.prepared.Close())
		s.prepared = nil
	}
	if s.shared != nil {
		errs = append(errs, s.shared.close())
	}
	clear(s.opened)
	clear(s.programs)
	s.shared = nil
	return errors.Join(errs...)
}

// install loads the programs and publishes them and the maps under a new name
// that is then renamed, so the instance is whole or absent.
func (s *State) install(c Capacity) error {
	inherited, err := s.heritage()
	if err != nil {
		return err
	}
	defer inherited.close()
	coll, err := load(c, inherited.maps)
	if err != nil {
		return err
	}
	defer coll.Close()
	if err := inherited.begin(coll.Maps[bpf.DatapathMapState]); err != nil {
		return fmt.Errorf("number endpoints: %w", err)
	}

	building := filepath.Join(s.layout.Dir(), "new")
	// The lock is held, so what is there is the rest of a process that died.
	if err := os.RemoveAll(building); err != nil {
		return fmt.Errorf("clean up: %w", err)
	}
	for _, dir := range []string{"", "maps", "progs", "links", "events"} {
		if err := os.Mkdir(filepath.Join(building, dir), 0o700); err != nil {
			return fmt.Errorf("make instance: %w", err)
		}
	}
	for name, m := range coll.Maps {
		if unpinned(name) {
			continue
		}
		if err := m.Pin(filepath.Join(building, "maps", name)); err != nil {
			return fmt.Errorf("pin map %s: %w", name, err)
		}
	}
	for name, p := range coll.Programs {
		if err := p.Pin(filepath.Join(building, "progs", name)); err != nil {
			return fmt.Errorf("pin program %s: %w", name, err)
		}
	}
	if err := os.Rename(building, s.layout.VersionDir()); err != nil {
		return fmt.Errorf("publish instance: %w", err)
	}
	return nil
}

// load verifies the programs. pinned maps, if any, take the place of new ones.
func load(c Capacity, pinned map[string]*ebpf.Map) (*ebpf.Collection, error) {
	if err := unlockMemory(); err != nil {
		return nil, err
	}
	spec, err := bpf.LoadDatapath()
	if err != nil {
		return nil, fmt.Errorf("read programs: %w", err)
	}
	c.apply(spec)
	slots := c.gateSlots()
	if gates := pinned[bpf.DatapathMapGates]; gates != nil {
		slots = gates.MaxEntries()
	}
	if err := setConstants(spec, slots); err != nil {
		return nil, err
	}
	for name, m := range pinned {
		spec.Maps[name].MaxEntries = m.MaxEntries()
	}
	coll, err := ebpf.NewCollectionWithOptions(spec, ebpf.CollectionOptions{MapReplacements: pinned})
	if err != nil {
		return nil, fmt.Errorf("load programs: %w", err)
	}
	return coll, nil
}

// unlockMemory lifts the limit that kernels before 5.11 hold maps to. Package
// rlimit of cilium/ebpf would do it where needed only, but finds that out
// whenever a process that links it starts: a tenth of an ADD.
func unlockMemory() error {
	unlimited := unix.Rlimit{Cur: unix.RLIM_INFINITY, Max: unix.RLIM_INFINITY}
	err := unix.Setrlimit(unix.RLIMIT_MEMLOCK, &unlimited)
	if err != nil && !errors.Is(err, unix.EPERM) {
		return fmt.Errorf("raise the memory lock limit: %w", err)
	}
	return nil
}

func setConstants(spec *ebpf.CollectionSpec, slots uint32) error {
	hz, err := timerFrequency()
	if err != nil {
		return err
	}
	for name, value := range map[string]any{
		bpf.DatapathVarGateMask:         slots - 1,
		bpf.DatapathVarJiffiesPerSecond: hz,
		bpf.DatapathVarFragmentTimeout:  hz * 60,
		bpf.DatapathVarNeighbourTimeout: hz * 5 * 24 * 60 * 60,
		bpf.DatapathVarFlowTimeouts:     flowTimeouts(hz),
	} {
		if err := spec.Variables[name].Set(value); err != nil {
			return fmt.Errorf("set %s: %w", name, err)
		}
	}
	return nil
}

// timerFrequency is the kernel's HZ: the coarse clock ticks with it.
func timerFrequency() (uint64, error) {
	var res unix.Timespec
	if err := unix.ClockGetres(unix.CLOCK_MONOTONIC_COARSE, &res); err != nil {
		return 0, fmt.Errorf("read the timer frequency: %w", err)
	}
	tick := uint64(res.Nano())
	if tick == 0 {
		return 0, fmt.Errorf("read the timer frequency: %w", errors.ErrUnsupported)
	}
	return (uint64(time.Second) + tick/2) / tick, nil
}

// flowTimeouts is the life of an idle flow in jiffies by kind and state. The
// values are those of Linux conntrack (nf_conntrack-sysctl).
func flowTimeouts(hz uint64) [32]uint64 {
	const day = 24 * 60 * 60
	var t [32]uint64
	for kind, seconds := range map[bpf.DatapathFlowKind][4]uint64{
		bpf.DatapathFlowKindFLOW_TCP:   {120, 5 * day, 120, 10},
		bpf.DatapathFlowKindFLOW_UDP:   {30, 120, 30, 30},
		bpf.DatapathFlowKindFLOW_SCTP:  {60, 5 * day, 60, 10},
		bpf.DatapathFlowKindFLOW_ICMP:  {30, 30, 30, 30},
		bpf.DatapathFlowKindFLOW_OTHER: {600, 600, 600, 600},
	} {
		for state, n := range seconds {
			t[int(kind)*int(bpf.DatapathFlowStateFLOW_STATES)+state] = n * hz
		}
	}
	return t
}

// m opens a pinned map and checks its shape against the Go types.
func (s *State) m(name string) (*ebpf.Map, error) {
	if m, ok := s.opened[name]; ok {
		return m, nil
	}
	m, err := loadPin[*ebpf.Map](s.layout.MapPath(name))
	if err != nil {
		return nil, fmt.Errorf("map %s: %w", name, err)
	}
	if want, ok := shapes()[name]; ok && (m.KeySize() != want.key || m.ValueSize() != want.value) {
		return nil, errors.Join(fmt.Errorf("map %s: %w: key and value have %d and %d bytes, not %d and %d",
			name, ErrABI, m.KeySize(), m.ValueSize(), want.key, want.value), m.Close())
	}
	s.opened[name] = m
	return m, nil
}

func (s *State) program(name string) (*ebpf.Program, error) {
	if p, ok := s.programs[name]; ok {
		return p, nil
	}
	p, err := loadPin[*ebpf.Program](s.layout.ProgramPath(name))
	if err != nil {
		return nil, fmt.Errorf("program %s: %w", name, err)
	}
	s.programs[name] = p
	return p, nil
}

// loadPin opens a pinned object. [ebpf.LoadPinnedProgram] would also find out
// whether the kernel knows names of objects: it makes a map for that, and looks
// for a BPF token at every mount point of the node.
func loadPin[T pin.Pinner](path string) (T, error) {
	var none T
	object, err := pin.Load(path, nil)
	if errors.Is(err, fs.ErrNotExist) {
		return none, ErrNotInstalled
	}
	if err != nil {
		return none, err
	}
	if t, ok := object.(T); ok {
		return t, nil
	}
	return none, errors.Join(fmt.Errorf("%w: %s is a %T, not a %T", ErrABI, path, object, none), object.Close())
}

// locked runs f while no other process changes the instance.
func (s *State) locked(ctx context.Context, f func() error) error {
	if s.private {
		return f()
	}
	l, err := acquire(ctx, s.layout.Dir(), s.lockTimeout)
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%w: no %s", ErrNotInstalled, s.layout.Dir())
	}
	if err != nil {
		return err
	}
	return errors.Join(f(), l.release())
}

// capacity is what the instance was made with.
func (s *State) capacity() (Capacity, error) {
	var c Capacity
	for name, field := range map[string]*uint32{
		bpf.DatapathMapEndpoints: &c.Endpoints,
		bpf.DatapathMapFlows:     &c.Flows,
		bpf.DatapathMapPeers:     &c.Peers,
		bpf.DatapathMapBlocks:    &c.Blocks,
		bpf.DatapathMapCells:     &c.Cells,
		bpf.DatapathMapRuleInfo:  &c.Rules,
		bpf.DatapathMapFrontends: &c.Services,
		bpf.DatapathMapFragments: &c.Fragments,
		bpf.DatapathMapEvents:    &c.EventBytes,
	} {
		m, err := s.m(name)
		if err != nil {
			return Capacity{}, err
		}
		*field = m.MaxEntries()
	}
	return c, nil
}

func (s *State) reportCapacity(wanted Capacity) {
	if got, err := s.capacity(); err == nil && got != wanted {
		s.log.Warn("the instance keeps the capacity it was made with", "capacity", got, "configured", wanted)
	}
}

// NewPrivate loads programs and maps that only this process sees: for answers
// about policy that is not enforced anywhere, and for tests.
func NewPrivate(_ context.Context, o Options) (*State, error) {
	o, err := o.withDefaults()
	if err != nil {
		return nil, err
	}
	coll, err := load(o.Capacity, nil)
	if err != nil {
		return nil, err
	}
	s := newState(o)
	s.private = true
	s.opened = maps.Clone(coll.Maps)
	s.programs = maps.Clone(coll.Programs)
	return s, nil
}

// mountBPFFS mounts a BPF file system unless one is there.
func mountBPFFS(ctx context.Context, path string, timeout time.Duration) error {
	if err := os.MkdirAll(path, 0o755); err != nil {
		return fmt.Errorf("mount point: %w", err)
	}
	if is, err := isBPFFS(path); is || err != nil {
		return err
	}
	// Of two at once one mounts: a second mount would hide the first.
	l, err := acquire(ctx, filepath.Dir(path), timeout)
	if err != nil {
		return err
	}
	defer func() { _ = l.release() }()
	if is, err := isBPFFS(path); is || err != nil {
		return err
	}
	if err := unix.Mount("bpf", path, "bpf", 0, "mode=0700"); err != nil {
		return fmt.Errorf("mount a BPF file system at %s: %w", path, err)
	}
	return nil
}

func isBPFFS(path string) (bool, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(path, &st); err != nil {
		return false, fmt.Errorf("look at %s: %w", path, err)
	}
	return st.Type == unix.BPF_FS_MAGIC, nil
}

// mapNames are the pinned maps, sorted.
func mapNames() []string { return slices.Sorted(maps.Keys(shapes())) }

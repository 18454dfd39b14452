package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"cnbd/config"
	"cnbd/device"
	"cnbd/internal/monitor"
	"cnbd/nbd"
)

// A condition is how an export is: open, with device and sampler, or not.
type condition struct {
	device  *device.Device
	sampler *monitor.Sampler
	err     error
}

// fault tells why clients cannot use v; nil if they can.
func (v *served) fault() error {
	switch c := v.condition.Load(); {
	case c == nil && v.export.Lazy:
		return nil // to be opened by the first client
	case c == nil:
		return errors.New("not open yet")
	case c.err != nil:
		return c.err
	default:
		return c.device.Err()
	}
}

// sample is the newest status of the device of v, nil if there is none.
func (v *served) sample(ctx context.Context) (*monitor.Sample, error) {
	if c := v.condition.Load(); c != nil && c.err == nil {
		return c.sampler.Sample(ctx)
	}
	return nil, v.fault()
}

// watch serves metrics and health, if that is wanted.
func (s *serving) watch() error {
	c := s.config
	if c.Metrics == "" {
		return nil
	}
	l, err := listenAt(c, c.Metrics)
	if err != nil {
		return fmt.Errorf("metrics: %w", err)
	}
	src := monitor.Source{Version: versionText(), Server: s.server.Metrics}
	for _, v := range s.stores {
		src.Exports = append(src.Exports, monitor.Export{
			Name: v.export.Name, Err: v.fault,
			Sample: func(ctx context.Context) *monitor.Sample {
				sample, _ := v.sample(ctx)
				return sample
			},
		})
	}
	s.monitor = monitor.Serve(l, src, c.Pprof)
	if a, err := config.ParseMetricsAddress(c.Metrics); err == nil && !a.Local() {
		s.log.Warn().Stringer("address", l.Addr()).Msg("whoever reaches this address can read metrics")
	} else {
		s.log.Info().Stringer("address", l.Addr()).Msg("metrics")
	}
	return nil
}

// A liveStatus is what top is told, about the export of one store. It is quickly
// gathered, and old as to the store's sizes.
type liveStatus struct {
	Time   time.Time       `json:"time"`
	Export string          `json:"export"`
	Server nbd.Metrics     `json:"server"` // for all of its exports
	Sample *monitor.Sample `json:"sample,omitempty"`
	Fault  string          `json:"fault,omitempty"`
}

// live gathers what top wants to know.
func (s *serving) live(ctx context.Context, v *served) *liveStatus {
	st := &liveStatus{Export: v.export.Name}
	var err error
	if st.Sample, err = v.sample(ctx); err == nil {
		err = v.fault()
	}
	if err != nil {
		st.Fault = err.Error()
	}
	st.Time, st.Server = time.Now(), s.server.Metrics() // the newest last
	return st
}

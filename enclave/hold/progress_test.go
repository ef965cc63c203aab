package hold

import (
	"errors"
	"sync"
	"testing"
)

func TestProgress(t *testing.T) {
	var p progress
	if p.look() != nil {
		t.Error("something of no files")
	}
	p.total.Store(250)
	fine := func() error { return nil }
	whole, part := p.counted(fine, 100, 150), p.counted(fine, 100, 100)
	var all sync.WaitGroup
	for range 3 { // one chunk more than the file has
		all.Go(func() { _ = whole() })
	}
	all.Wait()
	if got := p.look(); got.Bytes != 150 || got.Total != 250 {
		t.Errorf("%+v after a file of 150", got)
	}
	lapsed := errors.New("lapsed")
	if err := p.counted(func() error { return lapsed }, 100, 100)(); !errors.Is(err, lapsed) || p.look().Bytes != 150 {
		t.Errorf("a chunk that may not be read counts: %+v, %v", p.look(), err)
	}
	if err := part(); err != nil || p.look().Bytes != 250 {
		t.Errorf("%+v at the end, %v", p.look(), err)
	}
}

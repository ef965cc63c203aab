package hold

import (
	"container/list"
	"context"
	"errors"
	"fmt"
	"runtime"
	"sync"
	"time"

	"github.com/coffer-run/coffer/enclave/dma"
)

const (
	// maxCache bounds the chunks kept in memory, maxBuffers the ciphertext read
	// for decryption at one time, both in bytes: chunks are up to 16 MiB each, and
	// a machine has many cores.
	maxCache   = 32 << 20
	maxBuffers = 32 << 20
	// maxAhead bounds the chunks that are decrypted before they are asked for.
	maxAhead = 8
	// drainWait is how long the job's end waits for replies under way.
	drainWait = 5 * time.Second
)

var errOver = errors.New("the job is over")

// workersFor is how many chunks of a size are decrypted at one time.
func workersFor(chunkSize int) int {
	return max(1, min(runtime.GOMAXPROCS(0), maxBuffers/chunkSize))
}

// chunkCache holds decrypted chunks in locked memory.
type chunkCache struct {
	ending context.Context
	// use says whether keys may be used.
	use    func() error
	blocks *dma.Blocks
	// window is how many chunks are read ahead. slots bounds decryption.
	window int64
	slots  chan struct{}

	mu sync.Mutex
	// change is signalled when a chunk is no longer used.
	change *sync.Cond
	known  map[chunkKey]*chunk
	// lru has all of known, the most recently used in front.
	lru  *list.List
	used int
	over bool
}

type chunkKey struct {
	f *demandFile
	i int64
}

// chunk is one chunk, or on its way to be one.
type chunk struct {
	cache *chunkCache
	key   chunkKey
	block []byte
	at    *list.Element
	// ready is closed when data or err is there.
	ready chan struct{}
	data  []byte
	err   error
	// refs is guarded by the cache. While it is not zero the block stays.
	refs int
}

// newChunkCache keeps up to size bytes in chunks of at most chunkSize.
func newChunkCache(ending context.Context, use func() error, size int64, chunkSize int) *chunkCache {
	workers := workersFor(chunkSize)
	c := &chunkCache{ending: ending, use: use, blocks: dma.NewBlocks(size), known: map[chunkKey]*chunk{}, lru: list.New(),
		slots: make(chan struct{}, workers), window: min(2*int64(workers)+1, size/int64(dma.BlockSize(chunkSize))-1, maxAhead)}
	c.change = sync.NewCond(&c.mu)
	return c
}

// get returns chunk i, which the caller gives back with unref.
func (c *chunkCache) get(s *chunkSource, i int64) (*chunk, error) {
	c.mu.Lock()
	b, fresh, err := c.take(s, i, true)
	c.mu.Unlock()
	if err != nil {
		return nil, err
	}
	if fresh {
		c.slots <- struct{}{}
		c.decrypt(s, b)
		<-c.slots
	}
	<-b.ready
	if b.err != nil {
		c.unref(b)
		return nil, b.err
	}
	return b, nil
}

// ahead has chunks from i on decrypted, if that costs nobody a wait: up to window
// chunks beyond the one that was asked for last.
func (c *chunkCache) ahead(s *chunkSource, i int64) {
	select {
	case c.slots <- struct{}{}:
	default:
		return
	}
	// The handle may be closed before this is done.
	if !s.hold() {
		<-c.slots
		return
	}
	go func() {
		defer s.close()
		defer func() { <-c.slots }()
		for ; i < min(s.next.Load()+c.window, s.o.Chunks()); i++ {
			c.mu.Lock()
			b, fresh, err := c.take(s, i, false)
			c.mu.Unlock()
			if err != nil || b == nil {
				return
			}
			if fresh {
				c.decrypt(s, b)
			}
			c.unref(b)
		}
	}()
}

// take finds chunk i or makes a place for it, which fresh says. Without room it
// waits, or returns nil. c.mu is held.
func (c *chunkCache) take(s *chunkSource, i int64, wait bool) (_ *chunk, fresh bool, _ error) {
	key := chunkKey{s.f, i}
	for {
		if c.over || c.ending.Err() != nil {
			return nil, false, errOver
		}
		if b := c.known[key]; b != nil {
			b.refs++
			c.used++
			c.lru.MoveToFront(b.at)
			return b, false, nil
		}
		block, err := c.room(s.o.ChunkSize())
		if err != nil {
			return nil, false, err
		}
		if block != nil {
			b := &chunk{cache: c, key: key, block: block, ready: make(chan struct{}), refs: 1}
			b.at = c.lru.PushFront(b)
			c.known[key] = b
			c.used++
			return b, true, nil
		}
		if !wait {
			return nil, false, nil
		}
		c.change.Wait()
	}
}

// room returns a block, for which it gives up the chunk used least recently, or
// nil if all are in use. c.mu is held.
func (c *chunkCache) room(size int) ([]byte, error) {
	for {
		block, err := c.blocks.Get(size)
		if !errors.Is(err, dma.ErrFull) {
			return block, err
		}
		e := c.lru.Back()
		for e != nil && e.Value.(*chunk).refs > 0 {
			e = e.Prev()
		}
		if e == nil {
			return nil, nil
		}
		b := e.Value.(*chunk)
		block = b.block
		b.block = nil
		c.forget(b)
		// What the block held is the same job's, and is written over or cleared
		// before anyone reads from it.
		if len(block) == dma.BlockSize(size) {
			return block, nil
		}
		if err := c.blocks.Put(block); err != nil {
			return nil, err
		}
	}
}

// forget takes a chunk out of the cache. c.mu is held.
func (c *chunkCache) forget(b *chunk) {
	if b.at != nil {
		c.lru.Remove(b.at)
		b.at = nil
		delete(c.known, b.key)
	}
}

// decrypt fills a fresh chunk. The caller has a slot.
func (c *chunkCache) decrypt(s *chunkSource, b *chunk) {
	if c.ending.Err() != nil {
		c.fail(b, errOver)
		return
	}
	if err := c.use(); err != nil {
		c.fail(b, err)
		return
	}
	size := int64(s.o.ChunkSize())
	n := min(size, s.o.Size()-b.key.i*size)
	if err := s.o.ReadChunk(b.key.i, b.block[:n]); err != nil {
		c.fail(b, err)
		return
	}
	b.data = b.block[:n]
	close(b.ready)
}

// fail ends a chunk that did not come to be, so that it is tried again.
func (c *chunkCache) fail(b *chunk, err error) {
	c.mu.Lock()
	c.forget(b)
	c.mu.Unlock()
	b.err = err
	close(b.ready)
}

func (c *chunkCache) unref(b *chunk) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.release(b)
}

// release is unref with c.mu held.
func (c *chunkCache) release(b *chunk) {
	b.refs--
	c.used--
	if b.refs == 0 && b.at == nil {
		// A failed chunk: nobody finds it any more.
		if err := c.blocks.Put(b.block); err != nil {
			c.over = true
		}
		b.block = nil
	}
	c.change.Broadcast()
}

func (c *chunkCache) held() int64 { return c.blocks.Used() }

// close scrubs all chunks. The job is over: replies under way are waited for.
func (c *chunkCache) close() error {
	end := time.Now().Add(drainWait)
	late := time.AfterFunc(drainWait, func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.change.Broadcast()
	})
	defer late.Stop()
	c.mu.Lock()
	defer c.mu.Unlock()
	c.over = true
	c.change.Broadcast()
	for c.used > 0 && time.Now().Before(end) {
		c.change.Wait()
	}
	var err error
	if c.used > 0 {
		err = fmt.Errorf("%d chunks are still being read", c.used)
	}
	for e := c.lru.Front(); e != nil; e = c.lru.Front() {
		b := e.Value.(*chunk)
		c.forget(b)
		if b.refs == 0 {
			err = errors.Join(err, c.blocks.Put(b.block))
		}
	}
	return errors.Join(err, c.blocks.Close())
}

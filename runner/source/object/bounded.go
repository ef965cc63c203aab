package object

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
)

// maxWords bounds an answer that is no object's content, in bytes: a listing, or what a
// refusal says. A page of listPage entries is less, with names of 1024 characters that
// all need an escape. The providers' libraries read such answers whole.
const maxWords = 8 << 20

// contentKey marks requests whose answer is an object's content, which its reader
// bounds.
type contentKey struct{}

func forContent(ctx context.Context) context.Context {
	return context.WithValue(ctx, contentKey{}, true)
}

// bounded lets no more than so many bytes come of any other answer.
type bounded struct {
	http.RoundTripper
	most int
}

// RoundTrip is of http.RoundTripper.
func (b bounded) RoundTrip(r *http.Request) (*http.Response, error) {
	resp, err := b.RoundTripper.RoundTrip(r)
	if err != nil || resp.StatusCode/100 == 2 && r.Context().Value(contentKey{}) != nil {
		return resp, err
	}
	tooLong := fmt.Errorf("the store says more than %d bytes", b.most)
	if resp.ContentLength > int64(b.most) {
		return nil, errors.Join(tooLong, resp.Body.Close())
	}
	resp.Body = &words{resp.Body, b.most, tooLong}
	return resp, nil
}

type words struct {
	io.ReadCloser
	left    int
	tooLong error
}

func (w *words) Read(p []byte) (int, error) {
	// One byte more tells an answer that ends here from one that does not.
	n, err := w.ReadCloser.Read(p[:min(len(p), w.left+1)])
	if w.left -= n; w.left < 0 {
		return 0, w.tooLong
	}
	return n, err
}

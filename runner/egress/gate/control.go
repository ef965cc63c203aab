package gate

import (
	"encoding/json"
	"net/http"
	"os"
	"strconv"
	"time"
)

// maxWait bounds how long a question for a report waits for news.
const maxWait = 5 * time.Second

// Control answers the agent: GET /report?after=N&wait=MILLISECONDS, POST
// /close?why=WORD. Whoever can reach it is trusted; it listens on a unix socket of
// the job's run directory.
func (g *Gate) Control() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /report", func(w http.ResponseWriter, r *http.Request) {
		after, err := strconv.ParseUint(r.FormValue("after"), 10, 64)
		if err != nil {
			http.Error(w, "after: want a number", http.StatusBadRequest)
			return
		}
		wait, err := strconv.Atoi(r.FormValue("wait"))
		if err != nil || wait < 0 {
			http.Error(w, "wait: want milliseconds", http.StatusBadRequest)
			return
		}
		rep, more := g.ledger.report(after)
		if rep.Sequence <= after && wait > 0 {
			t := time.NewTimer(min(maxWait, time.Duration(wait)*time.Millisecond))
			defer t.Stop()
			select {
			case <-more:
			case <-t.C:
			case <-r.Context().Done():
				return
			}
			rep, _ = g.ledger.report(after)
		}
		rep.Pid = os.Getpid()
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(rep)
	})
	mux.HandleFunc("POST /close", func(w http.ResponseWriter, r *http.Request) {
		why := r.FormValue("why")
		if why == "" || len(why) > 64 {
			http.Error(w, "why: want a word", http.StatusBadRequest)
			return
		}
		g.Close(why)
		w.WriteHeader(http.StatusNoContent)
	})
	return mux
}

// Command model writes the initial weights of the Fashion-MNIST examples as a
// safetensors file: an 8-byte little-endian header length, a JSON header, and
// the tensors as little-endian float32.
package main

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"os"
)

type tensor struct {
	name  string
	shape []int
	// fanIn scales the values (He initialization); 0 means zeros.
	fanIn int
}

var models = map[string][]tensor{
	"mlp": {{"w1", []int{784, 256}, 784}, {"b1", []int{256}, 0}, {"w2", []int{256, 10}, 256}, {"b2", []int{10}, 0}},
	"cnn": {
		{"0.weight", []int{16, 1, 3, 3}, 9}, {"0.bias", []int{16}, 0},
		{"3.weight", []int{32, 16, 3, 3}, 144}, {"3.bias", []int{32}, 0},
		{"7.weight", []int{128, 1568}, 1568}, {"7.bias", []int{128}, 0},
		{"9.weight", []int{10, 128}, 128}, {"9.bias", []int{10}, 0},
	},
}

func main() {
	if err := run(os.Args[1:], os.Stderr); err != nil {
		fmt.Fprintln(os.Stderr, "model:", err)
		os.Exit(1)
	}
}

func run(args []string, stderr io.Writer) error {
	fs := flag.NewFlagSet("model", flag.ContinueOnError)
	fs.SetOutput(stderr)
	arch := fs.String("arch", "cnn", "cnn (torch) or mlp (numpy)")
	seed := fs.Uint64("seed", 1, "seed of the random weights")
	note := fs.String("note", "", "text to store in the header's metadata")
	out := fs.String("out", "", "file to write; put it on memory, /dev/shm, if the weights are secret")
	if err := fs.Parse(args); err != nil {
		return err
	}
	tensors, ok := models[*arch]
	if !ok || *out == "" || fs.NArg() > 0 {
		return errors.New("want -arch cnn or mlp, and -out FILE")
	}
	b, err := encode(tensors, *seed, *note)
	if err != nil {
		return err
	}
	return os.WriteFile(*out, b, 0o600)
}

func encode(tensors []tensor, seed uint64, note string) ([]byte, error) {
	rng := rand.New(rand.NewPCG(seed, 0)) //nolint:gosec // weights, not secrets: the same seed must give the same model
	header := map[string]any{"__metadata__": map[string]string{"note": note}}
	var data []byte
	for _, t := range tensors {
		n, begin := 1, len(data)
		for _, d := range t.shape {
			n *= d
		}
		for range n {
			v := float32(0)
			if t.fanIn > 0 {
				v = float32(rng.NormFloat64() * math.Sqrt(2/float64(t.fanIn)))
			}
			data = binary.LittleEndian.AppendUint32(data, math.Float32bits(v))
		}
		header[t.name] = map[string]any{"dtype": "F32", "shape": t.shape, "data_offsets": []int{begin, len(data)}}
	}
	h, err := json.Marshal(header)
	if err != nil {
		return nil, err
	}
	out := binary.LittleEndian.AppendUint64(nil, uint64(len(h)))
	return append(append(out, h...), data...), nil
}

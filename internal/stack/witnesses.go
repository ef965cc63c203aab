package stack

import "fmt"

// brokerWitness is a witness of the broker's configuration: its verifier key (C2SP
// signed-note) and the prefix of its add-checkpoint.
type brokerWitness struct {
	Key string `json:"key"`
	URL string `json:"url"`
}

// maxWitnesses bounds the witnesses that a stack is given.
const maxWitnesses = 16

// witnesses is a list of witnesses of the broker's log, if the stack is given any.
func (l Layout) witnesses() string { return l.path("witnesses.json") }

// setWitnesses has the broker's log ask the witnesses that the stack is given.
func (l Layout) setWitnesses(c *brokerConfig) error {
	c.Log.Witnesses = nil
	given, err := there(l.witnesses())
	if err != nil || !given {
		return err
	}
	var list []brokerWitness
	if err := readJSON(l.witnesses(), &list); err != nil {
		return err
	}
	if len(list) > maxWitnesses {
		return fmt.Errorf("%s has %d witnesses: want at most %d", l.witnesses(), len(list), maxWitnesses)
	}
	for _, w := range list {
		if w.Key == "" || w.URL == "" {
			return fmt.Errorf("%s: a witness has a key and a url", l.witnesses())
		}
	}
	c.Log.Witnesses = list
	return nil
}

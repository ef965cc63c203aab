// Package docs checks that what the documents tell people to type and to read
// is there.
package docs

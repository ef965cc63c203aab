package deptest

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// Source is one parsed non-test file.
type Source struct {
	// Path is relative to the module's root, with slashes.
	Path string
	File *ast.File
	Set  *token.FileSet
}

// ParseTree parses every non-test Go file of the module at dir, other modules
// and build output left out.
func ParseTree(fsys fs.FS) ([]Source, error) {
	var out []Source
	set := token.NewFileSet()
	err := fs.WalkDir(fsys, ".", func(p string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case d.IsDir():
			name := d.Name()
			if p != "." && (strings.HasPrefix(name, ".") || strings.HasPrefix(name, "_") || name == "testdata" || p == "build" || p == "tools") {
				return fs.SkipDir
			}
			return nil
		case !strings.HasSuffix(p, ".go") || strings.HasSuffix(p, "_test.go"):
			return nil
		}
		b, err := fs.ReadFile(fsys, p)
		if err != nil {
			return err
		}
		f, err := parser.ParseFile(set, p, b, parser.ParseComments|parser.SkipObjectResolution)
		if err != nil {
			return err
		}
		out = append(out, Source{Path: p, File: f, Set: set})
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("parse sources: %w", err)
	}
	return out, nil
}

// PackageComments returns a sentence for each package that does not have
// exactly one package comment. Packages of generated files alone need none.
func PackageComments(sources []Source) []string {
	comments := map[string][]string{}
	names := map[string]string{}
	for _, s := range sources {
		if ast.IsGenerated(s.File) {
			continue
		}
		dir := filepath.ToSlash(filepath.Dir(s.Path))
		names[dir] = s.File.Name.Name
		if s.File.Doc != nil && strings.TrimSpace(s.File.Doc.Text()) != "" {
			comments[dir] = append(comments[dir], s.Path)
			text := s.File.Doc.Text()
			if n := s.File.Name.Name; n != "main" && !strings.HasPrefix(text, "Package "+n+" ") {
				comments[dir] = append(comments[dir], "which does not begin with \"Package "+n+" \"")
			}
		}
	}
	var out []string
	for dir := range names {
		switch c := comments[dir]; {
		case len(c) == 0:
			out = append(out, dir+": no package comment: say in one sentence what the package is for")
		case len(c) > 1:
			out = append(out, dir+": want one package comment, found "+strings.Join(c, ", "))
		}
	}
	slices.Sort(out)
	return out
}

// netAllowed are the names of package net that have nothing to do with a
// network, or are held to unix sockets by their type.
var netAllowed = []string{
	"Addr", "Buffers", "Conn", "Error", "ErrClosed", "Listener", "OpError", "PacketConn", "Pipe",
	"DialUnix", "ListenUnix", "ListenUnixgram", "ResolveUnixAddr", "UnixAddr", "UnixConn", "UnixListener",
	"FileConn", "FileListener", "FilePacketConn",
}

// netByWord are the names of package net whose network is chosen by a word.
var netByWord = []string{"Dial", "DialTimeout", "Listen", "ListenPacket", "Dialer", "ListenConfig"}

// families and addresses are the words of the system call packages that reach
// further than a unix socket. Comparing with a family opens nothing.
var (
	families  = []string{"AF_INET", "AF_INET6", "AF_PACKET", "AF_VSOCK", "AF_XDP", "AF_BLUETOOTH"}
	addresses = []string{"SockaddrInet4", "SockaddrInet6", "SockaddrLinklayer", "SockaddrVM", "SockaddrXDP"}
)

// UnixOnly returns a sentence for each use of package net, or of a socket
// family, in sources under dir that could be anything but a unix socket. The
// network must stand as a literal where it is used.
func UnixOnly(sources []Source, dir string) []string {
	var out []string
	for _, s := range sources {
		if !strings.HasPrefix(s.Path, dir+"/") {
			continue
		}
		netName := importName(s.File, "net")
		byWord := false
		ast.Inspect(s.File, func(n ast.Node) bool {
			if call, ok := n.(*ast.CallExpr); ok {
				for _, a := range call.Args {
					if sel, ok := a.(*ast.SelectorExpr); ok && slices.Contains(families, sel.Sel.Name) {
						out = append(out, fmt.Sprintf("%s: %s is not a unix socket", s.Set.Position(sel.Pos()), sel.Sel.Name))
					}
				}
				return true
			}
			sel, ok := n.(*ast.SelectorExpr)
			if !ok {
				return true
			}
			if slices.Contains(addresses, sel.Sel.Name) {
				out = append(out, fmt.Sprintf("%s: %s is not a unix socket", s.Set.Position(sel.Pos()), sel.Sel.Name))
			}
			x, ok := sel.X.(*ast.Ident)
			if !ok || netName == "" || x.Name != netName || slices.Contains(netAllowed, sel.Sel.Name) {
				return true
			}
			byWord = byWord || slices.Contains(netByWord, sel.Sel.Name)
			if !slices.Contains(netByWord, sel.Sel.Name) {
				out = append(out, fmt.Sprintf("%s: net.%s: only unix sockets are allowed here", s.Set.Position(sel.Pos()), sel.Sel.Name))
			}
			return true
		})
		if netName == "." {
			out = append(out, s.Path+": imports net by a dot")
		}
		if !byWord {
			continue
		}
		ast.Inspect(s.File, func(n ast.Node) bool {
			call, ok := n.(*ast.CallExpr)
			if !ok {
				return true
			}
			sel, ok := call.Fun.(*ast.SelectorExpr)
			if !ok || !slices.Contains([]string{"Dial", "DialContext", "DialTimeout", "Listen", "ListenPacket"}, sel.Sel.Name) {
				return true
			}
			if !slices.ContainsFunc(call.Args, isUnixLiteral) {
				out = append(out, fmt.Sprintf("%s: %s: want a literal network that begins with unix", s.Set.Position(call.Pos()), sel.Sel.Name))
			}
			return true
		})
	}
	return out
}

func isUnixLiteral(e ast.Expr) bool {
	l, ok := e.(*ast.BasicLit)
	if !ok || l.Kind != token.STRING {
		return false
	}
	v, err := strconv.Unquote(l.Value)
	return err == nil && slices.Contains([]string{"unix", "unixgram", "unixpacket"}, v)
}

func importName(f *ast.File, path string) string {
	for _, i := range f.Imports {
		p, err := strconv.Unquote(i.Path.Value)
		if err != nil || p != path {
			continue
		}
		if i.Name != nil {
			return i.Name.Name
		}
		return path
	}
	return ""
}

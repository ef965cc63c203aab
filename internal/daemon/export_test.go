package daemon

var ExitCode = exitCode

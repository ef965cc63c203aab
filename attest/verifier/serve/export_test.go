package serve

// HandlerWithin is Handler with other limits of time.
var HandlerWithin = handler

// MaxCalls is how many calls one caller may have under way.
const MaxCalls = maxCalls

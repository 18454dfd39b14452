// Package lint has no code, only tests that keep the rules of the repository
// true: which package may import which, that tests' helpers stay in tests, that
// every dependency is accounted for, and that no file tells of the machine it
// was written on.
package lint

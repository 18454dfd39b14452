package disk

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"

	"golang.org/x/sys/unix"
)

// CreateFile makes a regular file at path that is there wholly or not at all:
// fill writes the content into a file under a temporary name in the same
// directory, the content is synced, the file takes its name, and the directory
// is synced. After an error nothing new is at path and no temporary file is
// left; the one that a killed process leaves is removed by the next creation of
// the same path. The file can be read and written by its owner alone.
//
// What is already at path is kept: the error is fs.ErrExist. With force it is
// replaced, provided that it is a regular file that nobody has open (ErrLocked);
// it stays locked until it is replaced. A symbolic link is followed.
//
// fill borrows the File, which is locked, empty and closed by CreateFile.
func CreateFile(path string, force bool, fill func(File) error) error {
	return Create(path, CreateOptions{Force: force}, func(f File, _ string) error { return fill(f) })
}

// CreateOptions are the settings of Create.
type CreateOptions struct {
	Force bool // as for CreateFile
	// Resume has fill go on with what is left of a creation of the same path that
	// was killed, or kept; without any it begins with an empty file as usual.
	Resume bool
	// Keep tells whether what fill has written is left, under its temporary name,
	// when fill has failed with that error. It may be nil: nothing is.
	Keep func(error) bool
}

// TemporaryName is where Create makes the file that is to be at path.
func TemporaryName(path string) string {
	return filepath.Join(filepath.Dir(path), "."+filepath.Base(path)+".new")
}

// Create is CreateFile with more settings. fill is also told the temporary name.
func Create(path string, o CreateOptions, fill func(f File, temp string) error) (err error) {
	old, path, err := claimOld(path, o.Force)
	if err != nil {
		return err
	}
	if old != nil {
		defer old.Close()
	}
	temp := TemporaryName(path)
	f, err := createLocked(temp, o.Resume)
	if err != nil {
		return err
	}
	complete := false
	place := temp // where the new file is and must not stay, if anywhere
	defer func() {
		if !complete && place != "" {
			os.Remove(place) // while the lock says that it is ours
		}
		f.Close()
	}()
	if err := fill(f, temp); err != nil {
		if o.Keep != nil && o.Keep(err) {
			place = ""
		}
		return err
	}
	if err := f.file.Sync(); err != nil {
		return err
	}
	if old != nil {
		if err := os.Rename(temp, path); err != nil {
			return err
		}
		place = "" // the old file is gone, and the new one is whole
	} else {
		if err := renameNew(temp, path); err != nil {
			return err
		}
		place = path
	}
	if err := SyncDir(filepath.Dir(path)); err != nil {
		return err
	}
	complete = true
	return nil
}

// claimOld decides about what is at path. It returns it, locked, when it is to
// be replaced, and the path without symbolic links.
func claimOld(path string, force bool) (*osFile, string, error) {
	st, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, path, nil
	}
	if err != nil {
		return nil, "", pathError("create", path, err)
	}
	if !force {
		return nil, "", pathError("create", path, syscall.EEXIST)
	}
	if st.Mode()&fs.ModeSymlink != 0 {
		if path, err = filepath.EvalSymlinks(path); err != nil {
			return nil, "", err
		}
	}
	f, err := open(path, OpenOptions{ReadOnly: true, Exclusive: true})
	if err != nil {
		return nil, "", err
	}
	if f.device {
		f.Close()
		return nil, "", pathError("create", path, fmt.Errorf("a block device cannot be replaced: %w", ErrFileType))
	}
	return f, path, nil
}

// createLocked creates path, which is nobody else's, and locks it. The lock
// tells a creation at work from the remains of one that was killed, which are
// removed or, with resume, opened.
func createLocked(path string, resume bool) (*osFile, error) {
	for range lockTries {
		file, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
		if errors.Is(err, fs.ErrExist) && resume {
			f, err := open(path, OpenOptions{})
			if errors.Is(err, fs.ErrNotExist) {
				continue
			}
			return f, err
		}
		if errors.Is(err, fs.ErrExist) {
			if err := removeUnlocked(path); err != nil {
				return nil, err
			}
			continue
		}
		if err != nil {
			return nil, pathError("create", path, err)
		}
		f, err := newOSFile(file)
		if err != nil {
			os.Remove(path)
			return nil, err
		}
		// Until the lock is held another creation may take the file for
		// remains and remove it.
		err = f.lock(true)
		if err == nil {
			var same bool
			if same, err = f.isAt(path); same {
				return f, nil
			}
		}
		f.Close()
		if err != nil && !errors.Is(err, ErrLocked) && !errors.Is(err, fs.ErrNotExist) {
			os.Remove(path)
			return nil, err
		}
	}
	return nil, pathError("create", path, ErrLocked)
}

// removeUnlocked removes path if nobody holds its lock.
func removeUnlocked(path string) error {
	f, err := openLocked(path, OpenOptions{ReadOnly: true, Exclusive: true})
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer f.Close()
	if same, _ := f.isAt(path); !same {
		return nil
	}
	return os.Remove(path)
}

// renameNew renames from to to, which must not exist.
func renameNew(from, to string) error {
	err := unix.Renameat2(unix.AT_FDCWD, from, unix.AT_FDCWD, to, unix.RENAME_NOREPLACE)
	if err == unix.EINVAL || unsupported(err) {
		// NFS and some others cannot; a hard link does not replace either.
		if err = unix.Link(from, to); err == nil {
			err = unix.Unlink(from)
		}
	}
	if err != nil {
		return pathError("create", to, err)
	}
	return nil
}

// SyncDir makes the names in dir durable: what was made, renamed or removed there.
func SyncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	// EINVAL: a filesystem whose directories need no sync.
	if err := d.Sync(); err != nil && !errors.Is(err, unix.EINVAL) {
		return err
	}
	return nil
}

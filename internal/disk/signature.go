package disk

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
)

// signatureBytes is how much of the head of a device is searched.
const signatureBytes = 1 << 20

// A signature is bytes at one of some offsets that tell what is on a device.
type signature struct {
	name    string
	magic   string
	offsets []int64
}

// signatures, the outer structure before what may lie inside it. The values
// are those of the formats' own documents and headers.
var signatures = []signature{
	{"GPT partition table", "EFI PART", []int64{512, 4096}},
	{"LUKS encrypted volume", "LUKS\xba\xbe", []int64{0}},
	{"Linux RAID member", "\xfc\x4e\x2b\xa9", []int64{0, 4096}}, // versions 1.1, 1.2
	{"LVM2 physical volume", "LABELONE", []int64{0, 512, 1024, 1536}},
	{"VDO volume", "dmvdo001", []int64{0}},
	{"bcache device", "\xc6\x85\x73\xf6\x4e\x1a\x45\xca\x82\x65\xf5\x7f\x48\xba\x6d\x81", []int64{4096 + 24}},
	{"bcachefs filesystem", "\xc6\x85\x73\xf6\x66\xce\x90\xa9\xd9\x6a\x60\xcf\x80\x3d\xf7\xef", []int64{4096 + 24}},
	{"Ceph OSD", "bluestore block device", []int64{0}},
	{"XFS filesystem", "XFSB", []int64{0}},
	{"Btrfs filesystem", "_BHRfS_M", []int64{64<<10 + 64}},
	{"F2FS filesystem", "\x10\x20\xf5\xf2", []int64{1024}},
	{"EROFS filesystem", "\xe2\xe1\xf5\xe0", []int64{1024}},
	{"SquashFS filesystem", "hsqs", []int64{0}},
	{"ISO 9660 filesystem", "CD001", []int64{32<<10 + 1}},
	// The magic ends the first page, of whatever size that was.
	{"swap space", "SWAPSPACE2", []int64{4096 - 10, 8192 - 10, 16384 - 10, 65536 - 10}},
	{"swap space", "SWAP-SPACE", []int64{4096 - 10, 8192 - 10, 16384 - 10, 65536 - 10}},
	{"qcow2 image", "QFI\xfb", []int64{0}},
	{"VHDX image", "vhdxfile", []int64{0}},
	{"NTFS filesystem", "NTFS    ", []int64{3}},
	{"exFAT filesystem", "EXFAT   ", []int64{3}},
	{"FAT filesystem", "FAT12   ", []int64{54}},
	{"FAT filesystem", "FAT16   ", []int64{54}},
	{"FAT filesystem", "FAT32   ", []int64{82}},
}

// ForeignSignature names what else than a store seems to be on f, "" if
// nothing that it knows: a partition table, a filesystem, swap space, a member
// of a RAID, a volume group or a pool, a disk image. It reads the first MiB and
// the places at the end of f where Linux RAID keeps its superblock.
func ForeignSignature(f File) (string, error) {
	size, err := f.Size()
	if err != nil {
		return "", err
	}
	head := make([]byte, min(size, signatureBytes))
	if _, err := f.ReadAt(head, 0); err != nil && !errors.Is(err, io.EOF) {
		return "", err
	}
	for _, s := range signatures {
		for _, off := range s.offsets {
			if hasAt(head, s.magic, off) {
				return s.name, nil
			}
		}
	}
	if name := extSignature(head); name != "" {
		return name, nil
	}
	if hasZFSLabel(head) {
		return "ZFS pool member", nil
	}
	raid, err := hasRAIDAtEnd(f, size)
	if err != nil {
		return "", err
	}
	if raid {
		return "Linux RAID member", nil
	}
	// Last, for a filesystem's boot sector ends in the same two bytes.
	if hasAt(head, "\x55\xaa", 510) {
		return "MBR partition table", nil
	}
	return "", nil
}

func hasAt(b []byte, magic string, off int64) bool {
	return off <= int64(len(b)) && bytes.HasPrefix(b[off:], []byte(magic))
}

// extSignature tells ext2, ext3 and ext4 by their feature bits.
func extSignature(head []byte) string {
	const (
		superblock  = 1024
		magic       = superblock + 0x38
		compat      = superblock + 0x5c
		incompat    = superblock + 0x60
		hasJournal  = 0x4
		ext4Feature = 0x40 | 0x80 | 0x200 // extents, 64bit, flex_bg
	)
	switch {
	case !hasAt(head, "\x53\xef", magic) || len(head) < incompat+4:
		return ""
	case binary.LittleEndian.Uint32(head[incompat:])&ext4Feature != 0:
		return "ext4 filesystem"
	case binary.LittleEndian.Uint32(head[compat:])&hasJournal != 0:
		return "ext3 filesystem"
	default:
		return "ext2 filesystem"
	}
}

// hasZFSLabel looks for an uberblock in the two labels of 256 KiB at the head.
func hasZFSLabel(head []byte) bool {
	const (
		label      = 256 << 10
		uberblocks = 128 << 10 // in the label, to its end
		slot       = 1 << 10
		magic      = 0x00bab10c
	)
	for off := uberblocks; off+8 <= min(len(head), 2*label); off += slot {
		if off%label < uberblocks {
			continue
		}
		// In the byte order of the machine that wrote it.
		if binary.LittleEndian.Uint64(head[off:]) == magic || binary.BigEndian.Uint64(head[off:]) == magic {
			return true
		}
	}
	return false
}

// hasRAIDAtEnd looks for the superblocks of versions 0.90 and 1.0.
func hasRAIDAtEnd(f File, size int64) (bool, error) {
	for _, off := range []int64{
		size&^(64<<10-1) - 64<<10,
		(size - 8<<10) &^ (4<<10 - 1),
	} {
		if off < 0 {
			continue
		}
		var b [4]byte
		if _, err := f.ReadAt(b[:], off); err != nil && !errors.Is(err, io.EOF) {
			return false, err
		}
		// Version 0.90 is in the byte order of the machine.
		if s := string(b[:]); s == "\xfc\x4e\x2b\xa9" || s == "\xa9\x2b\x4e\xfc" {
			return true, nil
		}
	}
	return false, nil
}

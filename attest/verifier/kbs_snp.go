package verifier

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"github.com/coffer-run/coffer/attest/snp"
)

// maxKBSCertificates bounds the certificates that come with a report.
const maxKBSCertificates = 16

// sevOctets are bytes as serde writes them: an array of numbers.
type sevOctets []uint16

// put writes the octets into b, which they must fill.
func (o sevOctets) put(b []byte) error {
	if len(o) != len(b) {
		return fmt.Errorf("%d octets: want %d", len(o), len(b))
	}
	for i, n := range o {
		if n > 0xff {
			return fmt.Errorf("octet %d", n)
		}
		b[i] = byte(n)
	}
	return nil
}

type sevTCB struct {
	FMC        *uint8 `json:"fmc"`
	Bootloader uint8  `json:"bootloader"`
	TEE        uint8  `json:"tee"`
	SNP        uint8  `json:"snp"`
	Microcode  uint8  `json:"microcode"`
}

// put writes TCB_VERSION (AMD document 56860, tables 4 and 5).
func (t sevTCB) put(b []byte, turin bool) {
	if !turin {
		b[0], b[1], b[6], b[7] = t.Bootloader, t.TEE, t.SNP, t.Microcode
		return
	}
	if t.FMC != nil {
		b[0] = *t.FMC
	}
	b[1], b[2], b[3], b[7] = t.Bootloader, t.TEE, t.SNP, t.Microcode
}

type sevVersion struct {
	Major uint8 `json:"major"`
	Minor uint8 `json:"minor"`
	Build uint8 `json:"build"`
}

// sevReport is AttestationReport of the Rust crate sev, versions 6 and 7, as serde
// writes it: guests send the report taken apart, without its reserved bytes.
type sevReport struct {
	Version         uint32     `json:"version"`
	GuestSVN        uint32     `json:"guest_svn"`
	Policy          uint64     `json:"policy"`
	FamilyID        sevOctets  `json:"family_id"`
	ImageID         sevOctets  `json:"image_id"`
	VMPL            uint32     `json:"vmpl"`
	SigAlgo         uint32     `json:"sig_algo"`
	CurrentTCB      sevTCB     `json:"current_tcb"`
	PlatInfo        uint64     `json:"plat_info"`
	KeyInfo         uint32     `json:"key_info"`
	ReportData      sevOctets  `json:"report_data"`
	Measurement     sevOctets  `json:"measurement"`
	HostData        sevOctets  `json:"host_data"`
	IDKeyDigest     sevOctets  `json:"id_key_digest"`
	AuthorKeyDigest sevOctets  `json:"author_key_digest"`
	ReportID        sevOctets  `json:"report_id"`
	ReportIDMA      sevOctets  `json:"report_id_ma"`
	ReportedTCB     sevTCB     `json:"reported_tcb"`
	Family          *uint8     `json:"cpuid_fam_id"`
	Model           *uint8     `json:"cpuid_mod_id"`
	Stepping        *uint8     `json:"cpuid_step"`
	ChipID          sevOctets  `json:"chip_id"`
	CommittedTCB    sevTCB     `json:"committed_tcb"`
	Current         sevVersion `json:"current"`
	Committed       sevVersion `json:"committed"`
	LaunchTCB       sevTCB     `json:"launch_tcb"`
	LaunchMit       *uint64    `json:"launch_mit_vector"`
	CurrentMit      *uint64    `json:"current_mit_vector"`
	Signature       struct {
		R sevOctets `json:"r"`
		S sevOctets `json:"s"`
	} `json:"signature"`
}

// familyTurin is the CPUID family whose reports have Turin's layout of the TCB.
const familyTurin = 0x1A

// bytes puts the report together again (AMD document 56860, table 23). It decides
// nothing: if one bit differs from what the processor signed, reserved ones
// included, the signature does not hold.
func (r *sevReport) bytes() ([]byte, error) {
	b := make([]byte, snp.ReportSize)
	le := binary.LittleEndian
	le.PutUint32(b[0x000:], r.Version)
	le.PutUint32(b[0x004:], r.GuestSVN)
	le.PutUint64(b[0x008:], r.Policy)
	le.PutUint32(b[0x030:], r.VMPL)
	le.PutUint32(b[0x034:], r.SigAlgo)
	le.PutUint64(b[0x040:], r.PlatInfo)
	le.PutUint32(b[0x048:], r.KeyInfo)
	for _, f := range []struct {
		name     string
		at, size int
		octets   sevOctets
	}{
		{"family_id", 0x010, 16, r.FamilyID},
		{"image_id", 0x020, 16, r.ImageID},
		{"report_data", 0x050, 64, r.ReportData},
		{"measurement", 0x090, 48, r.Measurement},
		{"host_data", 0x0C0, 32, r.HostData},
		{"id_key_digest", 0x0E0, 48, r.IDKeyDigest},
		{"author_key_digest", 0x110, 48, r.AuthorKeyDigest},
		{"report_id", 0x140, 32, r.ReportID},
		{"report_id_ma", 0x160, 32, r.ReportIDMA},
		{"chip_id", 0x1A0, 64, r.ChipID},
		{"signature.r", 0x2A0, 72, r.Signature.R},
		{"signature.s", 0x2E8, 72, r.Signature.S},
	} {
		if err := f.octets.put(b[f.at : f.at+f.size]); err != nil {
			return nil, fmt.Errorf("%s: %w", f.name, err)
		}
	}
	turin := r.Family != nil && *r.Family == familyTurin
	r.CurrentTCB.put(b[0x038:], turin)
	r.ReportedTCB.put(b[0x180:], turin)
	r.CommittedTCB.put(b[0x1E0:], turin)
	r.LaunchTCB.put(b[0x1F0:], turin)
	for at, p := range map[int]*uint8{0x188: r.Family, 0x189: r.Model, 0x18A: r.Stepping} {
		if p != nil {
			b[at] = *p
		}
	}
	for at, v := range map[int]sevVersion{0x1E8: r.Current, 0x1EC: r.Committed} {
		b[at], b[at+1], b[at+2] = v.Build, v.Minor, v.Major
	}
	for at, p := range map[int]*uint64{0x1F8: r.LaunchMit, 0x200: r.CurrentMit} {
		if p != nil {
			le.PutUint64(b[at:], *p)
		}
	}
	return b, nil
}

// sevCertificate is CertTableEntry of the same crate. Its type is a string, or an
// object for what has no name.
type sevCertificate struct {
	Type jsontext.Value `json:"cert_type"`
	Data sevOctets      `json:"data"`
}

// kbsGUID is the name of a kind of certificate in the certificate table (GHCB
// specification, MSG_REPORT certificates), in the order of bytes that tables have;
// empty for kinds that are not used.
func kbsGUID(kind string) string {
	switch kind {
	case "VCEK":
		return "\x63\xda\x75\x8d\xe6\x64\x45\x64\xad\xc5\xf4\xb9\x3b\xe8\xac\xcd"
	case "VLEK":
		return "\xa8\x07\x4b\xc2\xa2\x5a\x48\x3e\xaa\xe6\x39\xc0\x45\xa0\xb8\xa1"
	case "ASK":
		return "\x4a\xb7\xb3\x79\xbb\xac\x4f\xe4\xa0\x2f\x05\xae\xf3\x27\xc7\x82"
	case "ARK":
		return "\xc0\xb4\x06\xa4\xa8\x03\x49\x52\x97\x43\x3f\xb6\x01\x4c\xd0\xae"
	case "CRL":
		return "\x92\xf8\x1b\xc3\x58\x11\x4d\x3d\x97\xff\xd1\x9f\x88\xdc\x67\xea"
	}
	return ""
}

// parseKBSSNP reads the evidence of a guest's SEV-SNP attester
// (guest-components, attester/src/snp/mod.rs), and returns report and certificates
// in the forms that attest/snp reads. Members that are not known are left alone:
// what they would change the signature does not cover, or does not hold over.
func parseKBSSNP(b []byte) (snp.Evidence, error) {
	var e struct {
		Report       *sevReport       `json:"attestation_report"`
		Certificates []sevCertificate `json:"cert_chain"`
	}
	if err := json.Unmarshal(b, &e); err != nil {
		return snp.Evidence{}, err
	}
	if e.Report == nil {
		return snp.Evidence{}, errors.New("no attestation_report")
	}
	if len(e.Certificates) > maxKBSCertificates {
		return snp.Evidence{}, fmt.Errorf("%d certificates, at most %d are allowed", len(e.Certificates), maxKBSCertificates)
	}
	report, err := e.Report.bytes()
	if err != nil {
		return snp.Evidence{}, fmt.Errorf("attestation_report: %w", err)
	}
	table, err := kbsTable(e.Certificates)
	if err != nil {
		return snp.Evidence{}, fmt.Errorf("cert_chain: %w", err)
	}
	return snp.Evidence{Report: report, Certificates: table}, nil
}

// kbsTable encodes a certificate table; empty if there is no certificate.
func kbsTable(certs []sevCertificate) ([]byte, error) {
	var used []tableEntry
	for _, c := range certs {
		var kind string
		if c.Type.Kind() != '"' {
			continue
		}
		if err := json.Unmarshal(c.Type, &kind); err != nil {
			return nil, err
		}
		guid := kbsGUID(kind)
		if guid == "" {
			continue
		}
		data := make([]byte, len(c.Data))
		if err := c.Data.put(data); err != nil {
			return nil, fmt.Errorf("%s: %w", kind, err)
		}
		used = append(used, tableEntry{guid, data})
	}
	return encodeTable(used), nil
}

// tableEntry is a certificate of a certificate table, under the name of its kind.
type tableEntry struct {
	guid string
	data []byte
}

// encodeTable writes a certificate table (GHCB specification, MSG_REPORT
// certificates); nothing for no certificate.
func encodeTable(used []tableEntry) []byte {
	if len(used) == 0 {
		return nil
	}
	offset := 24 * (len(used) + 1)
	var head, body []byte
	for _, e := range used {
		head = append(head, e.guid...)
		head = binary.LittleEndian.AppendUint32(head, uint32(offset+len(body))) //nolint:gosec // a request is smaller
		head = binary.LittleEndian.AppendUint32(head, uint32(len(e.data)))      //nolint:gosec // a request is smaller
		body = append(body, e.data...)
	}
	return append(append(head, make([]byte, 24)...), body...)
}

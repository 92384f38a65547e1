package nbdnl

import (
	"errors"
	"time"

	"github.com/mdlayher/genetlink"
	"github.com/mdlayher/netlink"
)

// From linux/nbd-netlink.h.
const (
	familyName    = "nbd"
	familyVersion = 1

	cmdConnect     = 1
	cmdDisconnect  = 2
	cmdReconfigure = 3
	cmdStatus      = 5

	attrIndex             = 1
	attrSizeBytes         = 2
	attrBlockSizeBytes    = 3
	attrTimeout           = 4
	attrServerFlags       = 5
	attrClientFlags       = 6
	attrSockets           = 7
	attrDeadConnTimeout   = 8
	attrDeviceList        = 9
	attrBackendIdentifier = 10

	sockItem = 1 // in attrSockets
	sockFD   = 1 // in sockItem

	deviceItem      = 1 // in attrDeviceList
	deviceIndex     = 1 // in deviceItem
	deviceConnected = 2
)

// flagCanMultiConn is the transmission flag of that name.
const flagCanMultiConn = 1 << 8

// clientFlagDisconnectOnClose is NBD_CFLAG_DISCONNECT_ON_CLOSE of linux/nbd.h.
const clientFlagDisconnectOnClose = 1 << 1

var errAnswer = errors.New("kernel's answer lacks what was asked for")

func message(cmd uint8, attrs []byte) genetlink.Message {
	return genetlink.Message{
		Header: genetlink.Header{Command: cmd, Version: familyVersion},
		Data:   attrs,
	}
}

func connectAttrs(cfg *Config, fds []uint32) ([]byte, error) {
	ae := netlink.NewAttributeEncoder()
	if cfg.Index != FirstFree {
		ae.Uint32(attrIndex, uint32(cfg.Index))
	}
	ae.Uint64(attrSizeBytes, cfg.Size)
	ae.Uint64(attrBlockSizeBytes, cfg.BlockSize)
	if cfg.Timeout > 0 {
		ae.Uint64(attrTimeout, seconds(cfg.Timeout))
	}
	ae.Uint64(attrServerFlags, uint64(cfg.ServerFlags))
	if cfg.DeadConnTimeout > 0 {
		ae.Uint64(attrDeadConnTimeout, seconds(cfg.DeadConnTimeout))
	}
	if cfg.Backend != "" {
		ae.String(attrBackendIdentifier, cfg.Backend)
	}
	encodeSockets(ae, fds)
	return ae.Encode()
}

func encodeSockets(ae *netlink.AttributeEncoder, fds []uint32) {
	ae.Nested(attrSockets, func(list *netlink.AttributeEncoder) error {
		for _, fd := range fds {
			list.Nested(sockItem, func(item *netlink.AttributeEncoder) error {
				item.Uint32(sockFD, fd)
				return nil
			})
		}
		return nil
	})
}

func indexAttrs(index int, more func(*netlink.AttributeEncoder)) ([]byte, error) {
	ae := netlink.NewAttributeEncoder()
	ae.Uint32(attrIndex, uint32(index))
	if more != nil {
		more(ae)
	}
	return ae.Encode()
}

// seconds rounds up: a timeout must not become shorter, nor zero, which means
// something else.
func seconds(d time.Duration) uint64 {
	return uint64((d + time.Second - 1) / time.Second)
}

func parseIndex(msgs []genetlink.Message) (int, error) {
	for _, m := range msgs {
		ad, err := netlink.NewAttributeDecoder(m.Data)
		if err != nil {
			return 0, err
		}
		for ad.Next() {
			if ad.Type() == attrIndex {
				index := ad.Uint32()
				return int(index), ad.Err()
			}
		}
		if err := ad.Err(); err != nil {
			return 0, err
		}
	}
	return 0, errAnswer
}

func parseStatus(msgs []genetlink.Message) ([]Status, error) {
	var devices []Status
	for _, m := range msgs {
		ad, err := netlink.NewAttributeDecoder(m.Data)
		if err != nil {
			return nil, err
		}
		for ad.Next() {
			if ad.Type() != attrDeviceList {
				continue
			}
			ad.Nested(func(list *netlink.AttributeDecoder) error {
				for list.Next() {
					if list.Type() != deviceItem {
						continue
					}
					var s Status
					list.Nested(func(item *netlink.AttributeDecoder) error {
						for item.Next() {
							switch item.Type() {
							case deviceIndex:
								s.Index = int(item.Uint32())
							case deviceConnected:
								s.Connected = item.Uint8() != 0
							}
						}
						return nil
					})
					devices = append(devices, s)
				}
				return nil
			})
		}
		if err := ad.Err(); err != nil {
			return nil, err
		}
	}
	return devices, nil
}

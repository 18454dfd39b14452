package asyncq

// orderSizeInitial is the number of entries that an order begins with.
const orderSizeInitial = 64

// An entry is a task in the order.
type entry struct {
	task   Task
	tokens int64
	err    error // of Do, once done
	done   bool  // Do has returned
}

// An order holds the entries of a window of consecutive tickets in a ring, whose
// size is a power of two. The ring grows when the window does and is not made
// smaller: what has been in flight once will be again.
type order struct {
	ring []entry
}

// size is the number of tickets that the window can hold.
func (o *order) size() Ticket { return Ticket(len(o.ring)) }

// at is the entry of ticket t of the window; it is valid until the ring grows.
func (o *order) at(t Ticket) *entry { return &o.ring[t&(o.size()-1)] }

// grow doubles the ring and keeps the entries of the tickets [from, to).
func (o *order) grow(from, to Ticket) {
	larger := order{make([]entry, 2*len(o.ring))}
	for t := from; t < to; t++ {
		*larger.at(t) = *o.at(t)
	}
	*o = larger
}

# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, infer_types=False
"""The plan, executed in C: one walk over a message that checks each value and appends MessagePack to one buffer.

The walk runs no Python code and allocates nothing that the garbage collector tracks. So no other thread, signal handler
or finalizer runs in the middle of it, and references to the parts of the message stay valid without being counted. A
value that needs Python code ends the walk with a code. The code's value is then packed apart, from copies of its
containers, and the walk begins anew with those bytes in place of the value.

Buffers are on the stack of each call, or allocated for it: the walk may be entered again in between.
"""

import time as _time
from datetime import datetime, timezone
from ipaddress import IPv4Address, IPv6Address
from types import FunctionType
from uuid import UUID

from cpython.datetime cimport (
    PyDateTime_DATE_GET_HOUR, PyDateTime_DATE_GET_MICROSECOND, PyDateTime_DATE_GET_MINUTE, PyDateTime_DATE_GET_SECOND,
    PyDateTime_GET_DAY, PyDateTime_GET_MONTH, PyDateTime_GET_YEAR, import_datetime,
)
from cpython.mem cimport PyMem_Free, PyMem_Malloc, PyMem_Realloc
from cpython.object cimport PyObject, PyTypeObject
from libc.math cimport floor, isfinite
from libc.stdio cimport snprintf
from libc.stdlib cimport qsort
from libc.string cimport memcmp, memcpy, memset

from gevent.queue import Full, Queue

from ..schema.addresses import canonical_address
from ..schema.json_safe import MAX_SAFE_INTEGER
from ..schema.values import MAX_VALUES, normal_form
from .draft import EMPTY_STAMP, KEY, draft
from .encoding import OPTION_BYTES, TAG_AT, TAG_END, pack
from .plan import REQUIRED, AddressNode, CustomNode, GroupsNode, ItemsNode, MemberNode, TextNode

import_datetime()

cdef extern from *:
    """
    #include <datetime.h>
    #include <time.h>
    #ifndef Py_T_OBJECT_EX
    #include <structmember.h>
    #endif
    #define GA_SLOT(o, off) (*(PyObject **)((char *)(o) + (off)))
    static Py_ssize_t ga_offset(PyObject *d) {
        return Py_IS_TYPE(d, &PyMemberDescr_Type) ? ((PyMemberDescrObject *)d)->d_member->offset : -1;
    }
    static inline void ga_big_endian(char *p, unsigned long long v, int n) {
        while (n--) { p[n] = (char)v; v >>= 8; }
    }
    static inline unsigned long long ga_bits(double d) { unsigned long long v; memcpy(&v, &d, 8); return v; }
    static PyObject *ga_zone(PyObject *d) {
        return ((PyDateTime_DateTime *)d)->hastzinfo ? ((PyDateTime_DateTime *)d)->tzinfo : Py_None;
    }
    static double ga_now(void) {
        struct timespec now;
        clock_gettime(CLOCK_REALTIME, &now);
        return (double)(now.tv_sec * 1000000000LL + now.tv_nsec) / 1e9;
    }
    static int ga_second(long long seconds, char *text) {  // 20 characters, up to the point
        time_t moment = (time_t)seconds;
        struct tm t;
        return gmtime_r(&moment, &t) == NULL || strftime(text, 21, "%Y-%m-%dT%H:%M:%S.", &t) != 20 ? -1 : 0;
    }
    static int ga_contains(const char *p, Py_ssize_t n, const char *part, Py_ssize_t size) {
        for (; n >= size; p++, n--) if (*p == *part && !memcmp(p, part, size)) return 1;
        return 0;
    }
    """
    Py_ssize_t ga_offset(object descriptor)
    PyObject* GA_SLOT(PyObject* o, Py_ssize_t offset) noexcept
    void ga_big_endian(char* p, unsigned long long value, int size) noexcept
    unsigned long long ga_bits(double value) noexcept
    PyObject* ga_zone(PyObject* moment) noexcept
    double ga_now() noexcept
    int ga_second(long long seconds, char* text) noexcept
    bint ga_contains(const char* data, Py_ssize_t size, const char* part, Py_ssize_t part_size) noexcept

cdef extern from "Python.h":
    PyTypeObject* Py_TYPE(PyObject* o) noexcept
    bint PyUnicode_CheckExact(PyObject* o) noexcept
    bint PyUnicode_IS_COMPACT_ASCII(PyObject* o) noexcept
    Py_ssize_t PyUnicode_GET_LENGTH(PyObject* o) noexcept
    const char* PyUnicode_DATA(PyObject* o) noexcept
    const char* PyUnicode_AsUTF8AndSize(PyObject* o, Py_ssize_t* size) noexcept
    bint PyDict_CheckExact(PyObject* o) noexcept
    bint PyList_CheckExact(PyObject* o) noexcept
    bint PyTuple_CheckExact(PyObject* o) noexcept
    bint PyAnySet_CheckExact(PyObject* o) noexcept
    bint PyLong_CheckExact(PyObject* o) noexcept
    bint PyFloat_CheckExact(PyObject* o) noexcept
    bint PyBytes_CheckExact(PyObject* o) noexcept
    Py_ssize_t PyDict_Size(PyObject* o) noexcept
    bint PyDict_Next(PyObject* d, Py_ssize_t* pos, PyObject** key, PyObject** value) noexcept
    PyObject* PyDict_GetItemWithError(PyObject* d, PyObject* key) noexcept
    PyObject** PySequence_Fast_ITEMS(PyObject* o) noexcept
    Py_ssize_t PySequence_Fast_GET_SIZE(PyObject* o) noexcept
    char* PyBytes_AS_STRING(PyObject* o) noexcept
    Py_ssize_t PyBytes_GET_SIZE(PyObject* o) noexcept
    object PyBytes_FromStringAndSize(const char* s, Py_ssize_t n)
    long long PyLong_AsLongLongAndOverflow(PyObject* o, int* overflow) noexcept
    unsigned long long PyLong_AsUnsignedLongLong(PyObject* o) noexcept
    unsigned long long PyLong_AsUnsignedLongLongMask(PyObject* o) noexcept
    double PyFloat_AS_DOUBLE(PyObject* o) noexcept
    char* PyOS_double_to_string(double value, char code, int precision, int flags, int* kind) noexcept
    int Py_DTSF_ADD_DOT_0
    PyObject* PyErr_Occurred() noexcept
    void PyErr_Clear() noexcept
    unsigned long PyThread_get_thread_ident() noexcept
    PyObject* Py_True
    PyObject* Py_False
    PyObject* Py_None

cdef enum:
    FIRST = 4096  # bytes of a buffer on the stack
    MOST_PARTS = 16
    MOST_MEMBERS = 64
    FEW = 32  # texts that are sorted on the stack
    KEY_BYTES = 32
    BLOCK = 64  # bytes that SHA-256 takes at a time

cdef enum:  # the results of a walk
    DONE = 0
    UNSURE = -1
    NEEDS_PYTHON = -2

cdef PyObject* DATETIME = <PyObject*>datetime
cdef PyObject* UTC = <PyObject*>timezone.utc
cdef PyObject* UUID_TYPE = <PyObject*>UUID
cdef Py_ssize_t UUID_INT = ga_offset(UUID.int) if hasattr(UUID, "int") else -1
cdef object SHIFT = 64
cdef Py_ssize_t MOST_VALUES = MAX_VALUES
cdef long long SAFE_INTEGER = MAX_SAFE_INTEGER
cdef bytes KEY_UTF8 = KEY.encode(), EMPTY = EMPTY_STAMP
cdef object TIME = _time.time
cdef bint QUEUE_IS_COMPILED = not isinstance(Queue.put, FunctionType)
cdef tuple ADDRESSES = (str, IPv4Address, IPv6Address)


# -- the buffer --------------------------------------------------------------------------------------------------------


cdef struct Buffer:
    char* data
    char* heap
    Py_ssize_t used
    Py_ssize_t size
    Py_ssize_t limit
    Py_ssize_t values  # the values that custom data may still hold
    Py_ssize_t cut  # the place of the nil of an empty stamp
    Py_ssize_t ready_cut  # the same in custom data that needed Python code
    Py_ssize_t body  # the place of the body


cdef inline void start(Buffer* out, char* first, Py_ssize_t limit) noexcept:
    """Begin with a buffer of FIRST bytes on the caller's stack."""
    out.data, out.heap, out.used, out.size, out.limit, out.values = first, NULL, 0, FIRST, limit, MOST_VALUES
    out.cut = out.ready_cut = out.body = 0


cdef int grow(Buffer* out, Py_ssize_t more) noexcept:
    cdef Py_ssize_t size = out.size
    cdef char* heap
    if more > out.limit - out.used:
        return UNSURE
    while size < out.used + more:
        size *= 2
    heap = <char*>PyMem_Realloc(out.heap, size)
    if heap == NULL:
        return UNSURE
    if out.heap == NULL:
        memcpy(heap, out.data, out.used)
    out.heap = out.data = heap
    out.size = size
    return DONE


cdef inline int room(Buffer* out, Py_ssize_t more) noexcept:
    return DONE if more <= out.size - out.used else grow(out, more)


cdef inline int put(Buffer* out, const char* data, Py_ssize_t size) noexcept:
    if room(out, size) < 0:
        return UNSURE
    memcpy(out.data + out.used, data, size)
    out.used += size
    return DONE


cdef inline int put_bytes(Buffer* out, PyObject* data) noexcept:
    return put(out, PyBytes_AS_STRING(data), PyBytes_GET_SIZE(data))


cdef inline int put_number(Buffer* out, int code, unsigned long long value, int size) noexcept:
    """Append a code and a number of so many bytes."""
    if room(out, 9) < 0:
        return UNSURE
    out.data[out.used] = <char>code
    ga_big_endian(out.data + out.used + 1, value, size)
    out.used += 1 + size
    return DONE


cdef inline int put_header(Buffer* out, Py_ssize_t size, int few, int fix, int byte, int wide) noexcept:
    """Append the header of a value of that size; *few* sizes are in the code *fix* itself, *byte* may be 0."""
    if size < few:
        return put_number(out, fix | <int>size, 0, 0)
    if size < 256 and byte:
        return put_number(out, byte, size, 1)
    if size < 65536:
        return put_number(out, wide, size, 2)
    return put_number(out, wide + 1, size, 4)


cdef inline int put_map(Buffer* out, Py_ssize_t size) noexcept:
    return put_header(out, size, 16, 0x80, 0, 0xde)


cdef inline int put_array(Buffer* out, Py_ssize_t size) noexcept:
    return put_header(out, size, 16, 0x90, 0, 0xdc)


cdef inline const char* utf8(PyObject* text, Py_ssize_t* size) noexcept:
    """Return the bytes of an exact str, which keeps them; NULL if UTF-8 cannot write it."""
    cdef const char* data
    if PyUnicode_IS_COMPACT_ASCII(text):
        size[0] = PyUnicode_GET_LENGTH(text)
        return PyUnicode_DATA(text)
    data = PyUnicode_AsUTF8AndSize(text, size)
    if data == NULL:
        PyErr_Clear()
    return data


cdef inline int put_text(Buffer* out, const char* data, Py_ssize_t size) noexcept:
    if put_header(out, size, 32, 0xa0, 0xd9, 0xda) < 0:
        return UNSURE
    return put(out, data, size)


cdef inline int put_str(Buffer* out, PyObject* text) noexcept:
    cdef Py_ssize_t size
    cdef const char* data = utf8(text, &size)
    return UNSURE if data == NULL else put_text(out, data, size)


cdef Py_ssize_t packed_number(char* p, unsigned long long number) noexcept:
    """Write a number in up to 9 bytes, and return how many it takes."""
    cdef int size = 0 if number < 128 else 1 if number < 256 else 2 if number < 65536 else 4 if number < 1ull << 32 else 8
    if size == 0:
        p[0] = <char>number
        return 1
    p[0] = <char>(0xcc if size == 1 else 0xcd if size == 2 else 0xce if size == 4 else 0xcf)
    ga_big_endian(p + 1, number, size)
    return 1 + size


cdef int put_unsigned(Buffer* out, unsigned long long value) noexcept:
    if room(out, 9) < 0:
        return UNSURE
    out.used += packed_number(out.data + out.used, value)
    return DONE


cdef int put_integer(Buffer* out, PyObject* integer) noexcept:
    cdef int overflow = 0
    cdef unsigned long long big
    cdef long long value = PyLong_AsLongLongAndOverflow(integer, &overflow)
    if overflow > 0:
        big = PyLong_AsUnsignedLongLong(integer)
        if PyErr_Occurred() != NULL:
            PyErr_Clear()
            return UNSURE
        return put_unsigned(out, big)
    if overflow < 0:
        return UNSURE
    if value >= 0:
        return put_unsigned(out, <unsigned long long>value)
    if value >= -32:
        return put_number(out, <int>value, 0, 0)
    if value >= -128:
        return put_number(out, 0xd0, value, 1)
    if value >= -32768:
        return put_number(out, 0xd1, value, 2)
    if value >= -2147483648:
        return put_number(out, 0xd2, value, 4)
    return put_number(out, 0xd3, value, 8)


cdef int put_uuid(Buffer* out, PyObject* uuid) noexcept:
    cdef PyObject* number = GA_SLOT(uuid, UUID_INT)
    cdef unsigned long long halves[2]
    cdef char* p
    cdef int digit
    if number == NULL or not PyLong_CheckExact(number) or room(out, 38) < 0:
        return UNSURE
    try:
        halves[0] = <object>number >> SHIFT
    except Exception:  # no UUID sets such a number
        return UNSURE
    halves[1] = PyLong_AsUnsignedLongLongMask(number)
    p = out.data + out.used
    p[0] = <char>0xd9
    p[1] = 36
    p += 2
    for digit in range(32):
        if digit == 8 or digit == 12 or digit == 16 or digit == 20:
            p[0] = c"-"
            p += 1
        p[0] = (<const char*>b"0123456789abcdef")[(halves[digit >> 4] >> (60 - 4 * (digit & 15))) & 15]
        p += 1
    out.used += 38
    return DONE


cdef int put_utc(Buffer* out, PyObject* moment) noexcept:
    """Append a datetime in UTC as MessagePack's timestamp."""
    cdef long long year = PyDateTime_GET_YEAR(<object>moment), month = PyDateTime_GET_MONTH(<object>moment)
    cdef long long seconds, days
    cdef unsigned long long nanoseconds = 1000 * <unsigned long long>PyDateTime_DATE_GET_MICROSECOND(<object>moment)
    if month < 3:  # the year begins in March here, so that its last day is the leap day
        year -= 1
        month += 12
    days = 365 * year + year // 4 - year // 100 + year // 400 + (153 * month - 457) // 5
    days += PyDateTime_GET_DAY(<object>moment) - 719469
    seconds = 86400 * days + 3600 * PyDateTime_DATE_GET_HOUR(<object>moment)
    seconds += 60 * PyDateTime_DATE_GET_MINUTE(<object>moment) + PyDateTime_DATE_GET_SECOND(<object>moment)
    if seconds < 0 or seconds >> 34:
        if put(out, b"\xc7\x0c", 2) < 0 or put_number(out, 0xff, nanoseconds, 4) < 0 or room(out, 8) < 0:
            return UNSURE
        ga_big_endian(out.data + out.used, <unsigned long long>seconds, 8)
        out.used += 8
        return DONE
    if put(out, b"\xd6" if nanoseconds == 0 and seconds < 1ll << 32 else b"\xd7", 1) < 0:
        return UNSURE
    if nanoseconds == 0 and seconds < 1ll << 32:
        return put_number(out, 0xff, seconds, 4)
    return put_number(out, 0xff, nanoseconds << 34 | <unsigned long long>seconds, 8)


cdef int put_iso(Buffer* out, PyObject* moment) noexcept:
    """Append a datetime in UTC as ISO 8601 text."""
    cdef char text[40]
    cdef int size, microsecond = PyDateTime_DATE_GET_MICROSECOND(<object>moment)
    size = snprintf(
        text, 40, "%04d-%02d-%02dT%02d:%02d:%02d", PyDateTime_GET_YEAR(<object>moment),
        PyDateTime_GET_MONTH(<object>moment), PyDateTime_GET_DAY(<object>moment),
        PyDateTime_DATE_GET_HOUR(<object>moment), PyDateTime_DATE_GET_MINUTE(<object>moment),
        PyDateTime_DATE_GET_SECOND(<object>moment),
    )
    if microsecond:
        size += snprintf(text + size, 40 - size, ".%06d", microsecond)
    size += snprintf(text + size, 40 - size, "+00:00")
    return put_text(out, text, size)


# -- the nodes ---------------------------------------------------------------------------------------------------------


cdef class Node:
    """Checks one value, and writes it behind the bytes that stand before it. Written once, and never changed."""

    cdef bytes before

    cdef int write(self, Buffer* out, PyObject* value) noexcept:
        return UNSURE

    cdef bytes packed(self, value, Py_ssize_t* cut):
        """Return the MessagePack of a value that needs Python code; None to let marshmallow decide.

        Custom data alone sets *cut*, to the place of the nil of an empty stamp. Exceptions of that code propagate.
        """
        return None


cdef class Text(Node):
    cdef bint may_be_empty, may_be_blank

    def __init__(self, node):
        self.before, self.may_be_empty, self.may_be_blank = node.before, node.may_be_empty, node.may_be_blank

    cdef int write(self, Buffer* out, PyObject* value) noexcept:
        cdef Py_ssize_t size
        cdef const char* data
        if not PyUnicode_CheckExact(value):
            return UNSURE
        data = utf8(value, &size)
        if data == NULL or (size == 0 and not (self.may_be_empty and self.may_be_blank)):
            return UNSURE
        # A text may be blank only if it begins with white space: marshmallow looks closer.
        if not self.may_be_blank and (<unsigned char>data[0] <= 32 or <unsigned char>data[0] >= 127):
            if (<str>value).isspace():
                return UNSURE
        if put_bytes(out, <PyObject*>self.before) < 0:
            return UNSURE
        return put_text(out, data, size)


cdef class Member(Node):
    cdef PyObject* enum
    cdef int count
    cdef PyObject* members[MOST_MEMBERS]
    cdef PyObject* packed[MOST_MEMBERS]
    cdef dict numbers
    cdef object _alive

    def __init__(self, node):
        if len(node.packed) > MOST_MEMBERS:
            raise TypeError(f"{node.enum.__name__} has more than {MOST_MEMBERS} members")
        self.enum, self._alive = <PyObject*>node.enum, node
        self.numbers = {member.value: number for number, member in enumerate(node.packed)}
        for member, packed in node.packed.items():
            self.members[self.count], self.packed[self.count] = <PyObject*>member, <PyObject*>packed
            self.count += 1

    cdef int number(self, PyObject* value) noexcept:
        """Return the number of a member or of its value; UNSURE if it is neither."""
        cdef int number
        cdef PyObject* found
        if PyUnicode_CheckExact(value):
            found = PyDict_GetItemWithError(<PyObject*>self.numbers, value)
            return UNSURE if found == NULL else <int>PyLong_AsUnsignedLongLong(found)
        if <PyObject*>Py_TYPE(value) == self.enum:
            for number in range(self.count):
                if self.members[number] == value:
                    return number
        return UNSURE

    cdef int write(self, Buffer* out, PyObject* value) noexcept:
        cdef int number = self.number(value)
        return UNSURE if number < 0 else put_bytes(out, self.packed[number])


cdef class Address(Node):
    def __init__(self, node):
        self.before = node.before

    cdef int write(self, Buffer* out, PyObject* value) noexcept:
        cdef Py_ssize_t size
        if not PyUnicode_CheckExact(value) or not PyUnicode_IS_COMPACT_ASCII(value):
            return NEEDS_PYTHON
        size = PyUnicode_GET_LENGTH(value)
        if not is_plain_ipv4(PyUnicode_DATA(value), size):
            return NEEDS_PYTHON
        if put_bytes(out, <PyObject*>self.before) < 0:
            return UNSURE
        return put_text(out, PyUnicode_DATA(value), size)

    cdef bytes packed(self, value, Py_ssize_t* cut):
        if type(value) not in ADDRESSES:
            return None
        text, forbidden = canonical_address(str(value))
        if forbidden or not text:
            return None
        return self.before + pack(text)


cdef bint is_plain_ipv4(const char* text, Py_ssize_t size) noexcept:
    """Return True for four octets as the wire has them, the first not of a special range."""
    cdef int octet, value, digits
    cdef const char* end = text + size
    for octet in range(4):
        value = digits = 0
        while text < end and c"0" <= text[0] <= c"9" and digits < 4:
            if digits and value == 0:
                return False
            value = value * 10 + (text[0] - c"0")
            digits += 1
            text += 1
        if digits == 0 or value > 255 or (octet == 0 and (value == 0 or value == 127 or 224 <= value < 240)):
            return False
        if octet == 3:
            return text == end
        if text == end or text[0] != c".":
            return False
        text += 1


cdef struct Utf8:
    const char* data
    Py_ssize_t size


cdef struct Pair:
    Utf8 text  # of the key
    PyObject* key
    PyObject* value


cdef int by_bytes(const void* one, const void* other) noexcept nogil:
    cdef Utf8* a = <Utf8*>one
    cdef Utf8* b = <Utf8*>other
    cdef int order = memcmp(a.data, b.data, min(a.size, b.size))
    return order if order else (a.size > b.size) - (a.size < b.size)


cdef class Items(Node):
    cdef Node inner
    cdef bint is_ordered, may_be_empty

    def __init__(self, node):
        self.before, self.inner, self.may_be_empty = node.before, compiled(node.inner), node.may_be_empty
        self.is_ordered = node.order is not None

    cdef int write(self, Buffer* out, PyObject* value) noexcept:
        cdef Py_ssize_t size, i
        cdef PyObject** items
        if not (PyList_CheckExact(value) or PyTuple_CheckExact(value)):
            return NEEDS_PYTHON if self.is_ordered and PyAnySet_CheckExact(value) else UNSURE
        size, items = PySequence_Fast_GET_SIZE(value), PySequence_Fast_ITEMS(value)
        if (size == 0 and not self.may_be_empty) or put_bytes(out, <PyObject*>self.before) < 0:
            return UNSURE
        if self.is_ordered and size > 1:
            return self.write_ordered(out, items, size)
        return UNSURE if put_array(out, size) < 0 else write_all(self.inner, out, items, size)

    cdef bytes packed(self, value, Py_ssize_t* cut):
        cdef list copy = list(value)
        return written(self, <PyObject*>copy)

    cdef int write_ordered(self, Buffer* out, PyObject** items, Py_ssize_t size) noexcept:
        cdef unsigned long long found = 0
        cdef Py_ssize_t i, count = 0
        cdef int number
        cdef Utf8 few[FEW]
        cdef Utf8* texts
        cdef int result = UNSURE
        if isinstance(self.inner, Member):
            for i in range(size):
                number = (<Member>self.inner).number(items[i])
                if number < 0:
                    return UNSURE
                count += not (found >> number & 1)
                found |= 1ull << number
            if put_array(out, count) < 0:
                return UNSURE
            for number in range((<Member>self.inner).count):
                if found >> number & 1 and put_bytes(out, (<Member>self.inner).packed[number]) < 0:
                    return UNSURE
            return DONE
        texts = few
        if size > FEW:
            texts = <Utf8*>PyMem_Malloc(size * sizeof(Utf8))
        if texts == NULL:
            return UNSURE
        i = out.used
        if write_all(self.inner, out, items, size) == DONE:  # checks the items; its bytes are taken back
            out.used = i
            for i in range(size):
                texts[i].data = utf8(items[i], &texts[i].size)
            qsort(texts, size, sizeof(Utf8), by_bytes)
            for i in range(size):
                if i == 0 or by_bytes(&texts[i], &texts[count - 1]):
                    texts[count] = texts[i]
                    count += 1
            result = put_array(out, count)
            for i in range(count):
                if result == DONE:
                    result = put_text(out, texts[i].data, texts[i].size)
        if size > FEW:
            PyMem_Free(texts)
        return result


cdef int write_all(Node node, Buffer* out, PyObject** items, Py_ssize_t size) noexcept:
    cdef Py_ssize_t i
    for i in range(size):
        if node.write(out, items[i]) < 0:
            return UNSURE
    return DONE


cdef Pair* sorted_pairs(PyObject* mapping, Pair* few) noexcept:
    """Return the pairs of a dict, sorted by their keys: in *few* if they fit, else in memory that the caller frees.

    NULL if a key is no plain text.
    """
    cdef Py_ssize_t pos = 0, count = 0, size = PyDict_Size(mapping)
    cdef PyObject* key
    cdef PyObject* value
    cdef bint is_sorted = True
    cdef Pair* pairs = few
    if size > FEW:
        pairs = <Pair*>PyMem_Malloc(size * sizeof(Pair))
        if pairs == NULL:
            return NULL
    while PyDict_Next(mapping, &pos, &key, &value):
        pairs[count].key, pairs[count].value, pairs[count].text.data = key, value, NULL
        if PyUnicode_CheckExact(key):
            pairs[count].text.data = utf8(key, &pairs[count].text.size)
        if pairs[count].text.data == NULL:
            if pairs != few:
                PyMem_Free(pairs)
            return NULL
        if count and is_sorted:
            is_sorted = by_bytes(&pairs[count - 1], &pairs[count]) < 0
        count += 1
    if not is_sorted:
        qsort(pairs, size, sizeof(Pair), by_bytes)  # a pair begins with its text
    return pairs


cdef class Groups(Node):
    cdef Node key, items
    cdef bint is_ordered

    def __init__(self, node):
        self.before, self.key, self.items = node.before, compiled(node.key), compiled(node.items)
        self.is_ordered = node.order is not None

    cdef int write(self, Buffer* out, PyObject* value) noexcept:
        cdef Py_ssize_t pos = 0, size
        cdef PyObject* key
        cdef PyObject* group
        cdef PyObject* groups[MOST_MEMBERS]
        cdef Member member
        cdef int number
        if not PyDict_CheckExact(value):
            return UNSURE
        size = PyDict_Size(value)
        if size == 0 or put_bytes(out, <PyObject*>self.before) < 0 or put_map(out, size) < 0:
            return UNSURE
        if self.is_ordered and not isinstance(self.key, Member):
            return self.write_sorted(out, value, size)
        if self.is_ordered and size > 1:
            member = <Member>self.key
            for number in range(member.count):
                groups[number] = NULL
            while PyDict_Next(value, &pos, &key, &group):
                number = member.number(key)
                if number < 0 or groups[number] != NULL:
                    return UNSURE
                groups[number] = group
            for number in range(member.count):
                if groups[number] != NULL:
                    if put_bytes(out, member.packed[number]) < 0 or self.items.write(out, groups[number]) < 0:
                        return UNSURE
            return DONE
        while PyDict_Next(value, &pos, &key, &group):
            if self.key.write(out, key) < 0 or self.items.write(out, group) < 0:
                return UNSURE
        return DONE

    cdef int write_sorted(self, Buffer* out, PyObject* value, Py_ssize_t size) noexcept:
        cdef Pair few[FEW]
        cdef Pair* pairs = sorted_pairs(value, few)
        cdef Py_ssize_t i
        cdef int result = DONE
        if pairs == NULL:
            return UNSURE
        for i in range(size):
            if self.key.write(out, pairs[i].key) < 0 or self.items.write(out, pairs[i].value) < 0:
                result = UNSURE
                break
        if pairs != few:
            PyMem_Free(pairs)
        return result


cdef class Custom(Node):
    """Custom data. :meth:`write` writes values that need no Python code."""

    cdef int max_depth
    cdef bint has_timestamps, is_json_safe, is_stamped, is_sealed
    cdef object pack, pack_with_stamp

    def __init__(self, node, encoder):
        self.before, self.max_depth = node.before, node.max_depth
        self.pack, self.pack_with_stamp = encoder.pack_custom_data, encoder.pack_with_stamp
        self.has_timestamps, self.is_json_safe = datetime in node.native, node.is_json_safe
        self.is_stamped, self.is_sealed = node.is_stamped, node.is_sealed

    cdef int write(self, Buffer* out, PyObject* value) noexcept:
        if not PyDict_CheckExact(value):
            return UNSURE
        if PyDict_Size(value) == 0 and not self.is_stamped:
            return DONE
        if self.is_json_safe:
            return NEEDS_PYTHON
        if put_bytes(out, <PyObject*>self.before) < 0:
            return UNSURE
        return self.put_container(out, value, 1, False)

    cdef bytes packed(self, value, Py_ssize_t* cut):
        cdef char first[FIRST]
        cdef Buffer out
        start(&out, first, 1 << 40)
        cdef dict copy = (<dict>value).copy()
        if not self.is_json_safe and not self.is_sealed:
            try:
                if self.put_container(&out, <PyObject*>copy, 1, True) == DONE:
                    cut[0] = PyBytes_GET_SIZE(<PyObject*>self.before) + out.cut
                    return self.before + PyBytes_FromStringAndSize(out.data, out.used)
            finally:
                PyMem_Free(out.heap)
        if not self.is_stamped:
            return self.before + self.pack(normal_form(copy))  # sets, subclasses, other mappings
        data, place = self.pack_with_stamp(normal_form(copy))
        cut[0] = PyBytes_GET_SIZE(<PyObject*>self.before) + <Py_ssize_t>place
        return self.before + data

    cdef int put_value(self, Buffer* out, PyObject* value, int depth, bint python) except? UNSURE:
        out.values -= 1
        if out.values < 0:
            return UNSURE
        if PyUnicode_CheckExact(value):
            return put_str(out, value)
        if PyLong_CheckExact(value):
            return put_safe_integer(out, value) if self.is_sealed else put_integer(out, value)
        if value == Py_None or value == Py_True or value == Py_False:
            return put_number(out, 0xc0 if value == Py_None else 0xc3 if value == Py_True else 0xc2, 0, 0)
        if PyFloat_CheckExact(value) and self.is_sealed:
            return put_float_text(out, PyFloat_AS_DOUBLE(value))
        if PyFloat_CheckExact(value):
            return put_number(out, 0xcb, ga_bits(PyFloat_AS_DOUBLE(value)), 8)
        if PyBytes_CheckExact(value) and not self.is_sealed:
            if put_header(out, PyBytes_GET_SIZE(value), 0, 0, 0xc4, 0xc5) < 0:
                return UNSURE
            return put_bytes(out, value)
        if PyDict_CheckExact(value) or PyList_CheckExact(value) or PyTuple_CheckExact(value):
            return UNSURE if depth >= self.max_depth else self.put_container(out, value, depth + 1, python)
        if <PyObject*>Py_TYPE(value) == UUID_TYPE and UUID_INT >= 0:
            return put_uuid(out, value)
        if <PyObject*>Py_TYPE(value) == DATETIME and ga_zone(value) == UTC:
            if self.is_sealed:
                return put_iso(out, value)
            if self.has_timestamps:
                return put_utc(out, value)
        return self.put_by_python(out, <object>value) if python else NEEDS_PYTHON

    cdef int put_by_python(self, Buffer* out, object value) except? UNSURE:
        plain = normal_form({"": value})[""]
        if type(plain) is dict or type(plain) is list:  # its depth would have to be checked
            return UNSURE
        plain = self.pack(plain)
        return put_bytes(out, <PyObject*>plain)

    cdef int put_container(self, Buffer* out, PyObject* value, int depth, bint python) except? UNSURE:
        cdef Py_ssize_t pos = 0, size
        cdef PyObject* key
        cdef PyObject* each
        cdef int result = DONE
        cdef object copy
        cdef bint is_stamped = self.is_stamped and depth == 1
        if PyDict_CheckExact(value):
            if self.is_sealed:
                return self.put_sorted(out, value, depth)
            if python:
                copy = (<dict>value).copy()
                value = <PyObject*>copy
            if put_map(out, PyDict_Size(value) + is_stamped) < 0 or (is_stamped and put_empty_stamp(out) < 0):
                return UNSURE
            while PyDict_Next(value, &pos, &key, &each):
                out.values -= 1
                if PyUnicode_CheckExact(key):
                    result = UNSURE if is_stamped and is_reserved(key) else put_str(out, key)
                elif PyLong_CheckExact(key) and depth > 1:
                    result = put_integer(out, key)
                else:
                    return NEEDS_PYTHON if not python else UNSURE
                if result == DONE:
                    result = self.put_value(out, each, depth, python)
                if result < 0:
                    return result
            return DONE
        if python:
            copy = tuple(<object>value)
            value = <PyObject*>copy
        size = PySequence_Fast_GET_SIZE(value)
        if put_array(out, size) < 0:
            return UNSURE
        for pos in range(size):
            result = self.put_value(out, PySequence_Fast_ITEMS(value)[pos], depth, python)
            if result < 0:
                return result
        return DONE

    cdef int put_sorted(self, Buffer* out, PyObject* value, int depth) except? UNSURE:
        """Append a dict of a sealed record, and the stamp at its place on the first level."""
        cdef Pair few[FEW]
        cdef Pair* pairs = sorted_pairs(value, few)
        cdef Utf8 reserved
        cdef Py_ssize_t i, size = PyDict_Size(value)
        cdef bint is_due = depth == 1
        cdef int result, order
        if pairs == NULL:
            return UNSURE
        reserved.data, reserved.size = PyBytes_AS_STRING(<PyObject*>KEY_UTF8), PyBytes_GET_SIZE(<PyObject*>KEY_UTF8)
        result = put_map(out, size + is_due)
        for i in range(size):
            if is_due and result == DONE:
                order = by_bytes(&pairs[i], &reserved)
                if order == 0:
                    result = UNSURE
                elif order > 0:
                    result, is_due = put_empty_stamp(out), False
            out.values -= 1
            if result == DONE:
                result = put_text(out, pairs[i].text.data, pairs[i].text.size)
            if result == DONE:
                result = self.put_value(out, pairs[i].value, depth, False)
            if result < 0:
                break
        if result == DONE and is_due:
            result = put_empty_stamp(out)
        if pairs != few:
            PyMem_Free(pairs)
        return result


cdef inline int put_empty_stamp(Buffer* out) noexcept:
    if put_bytes(out, <PyObject*>EMPTY) < 0:
        return UNSURE
    out.cut = out.used - 1
    return DONE


cdef inline bint is_reserved(PyObject* text) noexcept:
    cdef Py_ssize_t size = PyBytes_GET_SIZE(<PyObject*>KEY_UTF8)
    return (
        PyUnicode_GET_LENGTH(text) == size and PyUnicode_IS_COMPACT_ASCII(text)
        and memcmp(PyUnicode_DATA(text), PyBytes_AS_STRING(<PyObject*>KEY_UTF8), size) == 0
    )


cdef int put_safe_integer(Buffer* out, PyObject* integer) noexcept:
    """Append an integer, as text if JSON would change it."""
    cdef char text[24]
    cdef int overflow = 0
    cdef long long value = PyLong_AsLongLongAndOverflow(integer, &overflow)
    if overflow:
        return NEEDS_PYTHON
    if -SAFE_INTEGER <= value <= SAFE_INTEGER:
        return put_integer(out, integer)
    return put_text(out, text, snprintf(text, 24, "%lld", value))


cdef int put_float_text(Buffer* out, double value) noexcept:
    """Append the ``repr`` of a float."""
    cdef char* text
    cdef Py_ssize_t size = 0
    cdef int result
    if not isfinite(value):
        return UNSURE
    text = PyOS_double_to_string(value, c"r", 0, Py_DTSF_ADD_DOT_0, NULL)
    if text == NULL:
        PyErr_Clear()
        return UNSURE
    while text[size]:
        size += 1
    result = put_text(out, text, size)
    PyMem_Free(text)
    return result


cdef struct Part:
    Py_ssize_t offset
    PyObject* key
    PyObject* default
    PyObject* node


cdef class Nested(Node):
    """An object of one class, or a mapping: its values, in the order of the wire."""

    cdef PyObject* describes
    cdef Py_ssize_t count
    cdef Part parts[MOST_PARTS]
    cdef object _alive

    def __init__(self, node, encoder=None):
        nodes = [None if part.node is None else compiled(part.node, encoder) for part in node.parts]
        if len(nodes) > MOST_PARTS:
            raise TypeError(f"{node.describes.__name__} has more than {MOST_PARTS} fields")
        self._alive = node, nodes
        self.describes = <PyObject*>node.describes
        for part, each in zip(node.parts, nodes, strict=True):
            self.parts[self.count].offset = ga_offset(getattr(node.describes, part.name))
            self.parts[self.count].key, self.parts[self.count].node = <PyObject*>part.key, <PyObject*>each
            self.parts[self.count].default = NULL
            if part.default is not REQUIRED:
                self.parts[self.count].default = <PyObject*>part.default
            if self.parts[self.count].offset < 0:
                raise TypeError(f"{part.name} is not a slot")
            self.count += 1

    cdef int read(self, PyObject* value, PyObject** values) noexcept:
        cdef Py_ssize_t i, pos = 0, found = 0
        cdef PyObject* key
        if <PyObject*>Py_TYPE(value) == self.describes:
            for i in range(self.count):
                values[i] = GA_SLOT(value, self.parts[i].offset)
                if values[i] == NULL:
                    return UNSURE
            return DONE
        if not PyDict_CheckExact(value):
            return UNSURE
        while PyDict_Next(value, &pos, &key, &values[0]):  # so that no look-up runs the __eq__ of a key
            if not PyUnicode_CheckExact(key):
                return UNSURE
        for i in range(self.count):
            values[i] = PyDict_GetItemWithError(value, self.parts[i].key)
            if values[i] == NULL:
                values[i] = self.parts[i].default
                if values[i] == NULL:
                    return UNSURE
            else:
                found += 1
        return DONE if found == PyDict_Size(value) else UNSURE

    cdef int write(self, Buffer* out, PyObject* value) noexcept:
        cdef PyObject* values[MOST_PARTS]
        cdef Py_ssize_t i
        if self.read(value, values) < 0:
            return UNSURE
        for i in range(self.count):
            if (<Node>self.parts[i].node).write(out, values[i]) < 0:
                return UNSURE
        return DONE


cdef Node compiled(node, encoder=None):
    if isinstance(node, CustomNode):
        return Custom(node, encoder)
    kinds = {TextNode: Text, MemberNode: Member, AddressNode: Address, ItemsNode: Items, GroupsNode: Groups}
    return kinds.get(type(node), Nested)(node)


# -- frames ------------------------------------------------------------------------------------------------------------


cdef bytes written(Node node, PyObject* value):
    """Return the bytes of a value apart from a frame; None to let marshmallow decide. The caller holds the value."""
    cdef char first[FIRST]
    cdef Buffer out
    start(&out, first, 1 << 40)
    try:
        return PyBytes_FromStringAndSize(out.data, out.used) if node.write(&out, value) == DONE else None
    finally:
        PyMem_Free(out.heap)


cdef class Walker:
    """Writes frames by a plan. Thread-safe and re-entrant; see :class:`geventaudit.encoder.fallback.Walker`."""

    cdef Nested message, record
    cdef Py_ssize_t custom_at
    cdef bytes with_custom, without_custom, tail
    cdef dict names, heads
    cdef tuple needs
    cdef Py_ssize_t max_bytes
    cdef bint is_stamped

    def __init__(self, plan, encoder):
        self.message, self.record = Nested(plan.message), Nested(plan.record, encoder)
        self.custom_at = [part.name for part in plan.record.parts].index("custom_data")
        self.with_custom, self.without_custom, self.tail = plan.with_custom, plan.without_custom, plan.tail
        self.heads = plan.heads
        self.names = {name: plan.heads[kind] for name, kind in plan.names.items()}
        self.needs, self.max_bytes, self.is_stamped = plan.needs, encoder.max_frame_bytes, encoder.is_stamped

    def frame_of(self, message, double unix_time):
        """Return the frame of *message*, or None to let marshmallow decide. Raises no ``Exception``."""
        return self.frame(message, unix_time)

    cdef object frame(self, message, double unix_time):
        cdef char first[FIRST]
        cdef Buffer out
        start(&out, first, self.max_bytes)
        try:
            return self.taken(&out, unix_time) if self.walk(&out, message, unix_time) == DONE else None
        finally:
            PyMem_Free(out.heap)

    cdef object taken(self, Buffer* out, double unix_time):
        """Return the frame in the buffer."""
        cdef bytes frame = PyBytes_FromStringAndSize(out.data, out.used)
        return draft(frame, out.cut, out.body, unix_time) if self.is_stamped else frame

    cdef int walk(self, Buffer* out, message, double unix_time):
        """Write the frame of *message*: DONE, or UNSURE to let marshmallow decide."""
        cdef int result = NEEDS_PYTHON
        cdef list ready = None  # the parts that needed Python code
        cdef Py_ssize_t place
        try:
            while result == NEEDS_PYTHON:
                out.used, out.values = 0, MOST_VALUES
                result = self.write(out, <PyObject*>message, floor(unix_time), ready, &place)
                if result == NEEDS_PYTHON:
                    if ready is None:
                        ready = [None] * self.record.count
                    ready[place] = self.packed_part(message, place, &out.ready_cut)
                    if ready[place] is None:
                        return UNSURE
            return result if out.used <= out.limit else UNSURE
        except Exception:
            return UNSURE

    cdef int write(self, Buffer* out, PyObject* message, double seconds, list ready, Py_ssize_t* place) noexcept:
        """Write a frame; *place* is that of the part that ends the walk."""
        cdef PyObject* values[MOST_PARTS]
        cdef PyObject* of_message[MOST_PARTS]
        cdef Py_ssize_t starts[MOST_PARTS + 1]
        cdef PyObject* head
        cdef Py_ssize_t i
        cdef int result
        cdef bint has_custom
        if self.message.read(message, of_message) < 0 or self.record.read(of_message[1], values) < 0:
            return UNSURE
        head = self.head(of_message[0])
        if head == NULL or not 0 <= seconds < 1e15 or not PyDict_CheckExact(values[self.custom_at]):
            return UNSURE
        has_custom = PyDict_Size(values[self.custom_at]) > 0 or (ready is not None and ready[self.custom_at] is not None)
        if put_bytes(out, head) < 0 or put_unsigned(out, <unsigned long long>seconds) < 0:
            return UNSURE
        out.body = out.used
        if put_bytes(out, <PyObject*>(self.with_custom if has_custom else self.without_custom)) < 0:
            return UNSURE
        for i in range(self.record.count):
            starts[i], place[0] = out.used, i
            if ready is not None and ready[i] is not None:
                if i == self.custom_at:
                    out.cut = out.used + out.ready_cut
                result = put_bytes(out, <PyObject*>ready[i])
            else:
                result = (<Node>self.record.parts[i].node).write(out, values[i])
            if result < 0:
                return result
        starts[self.record.count] = out.used
        if self.lacks_description(out, values, starts):
            return UNSURE
        return put_bytes(out, <PyObject*>self.tail)

    cdef PyObject* head(self, PyObject* kind) noexcept:
        # By identity: the text "AsmAuditCP" equals a member, and names no type.
        cdef Py_ssize_t pos = 0
        cdef PyObject* member
        cdef PyObject* head
        if PyUnicode_CheckExact(kind):
            return PyDict_GetItemWithError(<PyObject*>self.names, kind)
        while PyDict_Next(<PyObject*>self.heads, &pos, &member, &head):
            if member == kind:
                return head
        return NULL

    cdef bint lacks_description(self, Buffer* out, PyObject** values, Py_ssize_t* starts) noexcept:
        cdef Py_ssize_t description, place
        cdef bytes packed
        for description, place, packed in self.needs:
            if PyUnicode_GET_LENGTH(values[description]) == 0 and ga_contains(
                out.data + starts[place], starts[place + 1] - starts[place],
                PyBytes_AS_STRING(<PyObject*>packed), PyBytes_GET_SIZE(<PyObject*>packed),
            ):
                return True
        return False

    cdef bytes packed_part(self, message, Py_ssize_t place, Py_ssize_t* cut):
        cdef PyObject* values[MOST_PARTS]
        cdef PyObject* of_message[MOST_PARTS]
        if self.message.read(<PyObject*>message, of_message) < 0 or self.record.read(of_message[1], values) < 0:
            return None
        return (<Node>self.record.parts[place].node).packed(<object>values[place], cut)


# -- stamps ------------------------------------------------------------------------------------------------------------

cdef object SHA256 = None  # of hashlib, which clients without stamps do not load
cdef bytes SEALED_LABEL = b"geventaudit seal 1\0", NEXT_LABEL = b"geventaudit seal 1 next\0"
cdef Py_ssize_t TAG = TAG_AT, TAG_SIZE = TAG_END - TAG_AT, OPTION = OPTION_BYTES
cdef long long text_second = -1
cdef char second_text[24]


cdef int put_time(char* text, double unix_time) except -1:
    """Write RFC 3339 with microseconds, 27 characters.

    The text of a second is kept until the next, which saves 0.17 us a record.
    """
    global text_second
    cdef long long second = <long long>floor(unix_time)
    cdef int microsecond = <int>((unix_time - <double>second) * 1e6), digit
    if second != text_second:
        text_second = -1
        if ga_second(second, second_text) < 0:
            raise ValueError(f"{unix_time} is no time of four digits a year")
        text_second = second
    memcpy(text, second_text, 20)
    for digit in range(6):
        text[25 - digit] = <char>(c"0" + microsecond % 10)
        microsecond //= 10
    text[26] = c"Z"
    return 0


cdef class ChainState:
    """The last number of a stream, and the key of the next record, which no code can read."""

    cdef readonly long long number
    cdef unsigned char key[KEY_BYTES]

    def __repr__(self):
        return "<secret>"

    def __reduce_ex__(self, protocol):
        raise TypeError("a secret cannot be copied or pickled")

    def __dealloc__(self):
        memset(self.key, 0, KEY_BYTES)


cdef class Chain(ChainState):
    """The numbers and keys of one stream; see :class:`geventaudit.trail.chain.Chain`."""

    cdef public bint is_busy
    cdef readonly object digest
    cdef unsigned char next_key[KEY_BYTES]
    cdef bint is_sealed
    cdef bytes before, between
    cdef bytes h  # of the frame that was built last

    def __init__(self, stream, key):
        global SHA256
        if SHA256 is None:
            from hashlib import sha256 as SHA256
        self.digest = SHA256()
        self.is_sealed = key is not None
        self.h = b""
        self.before = (b"\xa3mac\xd9\x40" + b"0" * 64 if self.is_sealed else b"") + b"\xa3seq"
        self.between = b"\xa6stream" + pack(stream) + b"\xa3tag"
        if self.is_sealed:
            memcpy(self.key, PyBytes_AS_STRING(<PyObject*>key._bytes), KEY_BYTES)

    def __dealloc__(self):
        memset(self.next_key, 0, KEY_BYTES)

    @property
    def state(self):
        """The last number that was given, and the key of the next record. Set it to :meth:`following`, or back."""
        cdef ChainState state = ChainState.__new__(ChainState)
        state.number = self.number
        memcpy(state.key, self.key, KEY_BYTES)
        return state

    @state.setter
    def state(self, ChainState state not None):
        self.number = state.number
        memcpy(self.key, state.key, KEY_BYTES)

    def frame_of(self, frame):
        """Return the frame of the next record, and its h; h is empty without a seal. Changes no state."""
        cdef PyObject* data = <PyObject*>frame
        built = self.build(
            PyBytes_AS_STRING(data), PyBytes_GET_SIZE(data), frame.cut, frame.body, frame.unix_time, frame.checkpoint,
            frame.was,
        )
        return built, self.h

    def following(self):
        """Return the state after the next record."""
        cdef ChainState state = ChainState.__new__(ChainState)
        state.number = self.number + 1
        if self.is_sealed:
            self.evolve(state.key)
        return state

    def forget(self):
        """Drop the key."""
        memset(self.key, 0, KEY_BYTES)
        self.number = 0

    cdef int evolve(self, unsigned char* key) except -1:
        """Write the key of the record after the next one."""
        cdef Py_ssize_t label = PyBytes_GET_SIZE(<PyObject*>NEXT_LABEL)
        cdef bytes data = PyBytes_FromStringAndSize(NULL, label + KEY_BYTES)
        cdef char* p = PyBytes_AS_STRING(<PyObject*>data)
        memcpy(p, PyBytes_AS_STRING(<PyObject*>NEXT_LABEL), label)
        memcpy(p + label, self.key, KEY_BYTES)
        data = SHA256(data).digest()
        memcpy(key, PyBytes_AS_STRING(<PyObject*>data), KEY_BYTES)
        return 0

    cdef bytes build(
        self, const char* data, Py_ssize_t size, Py_ssize_t cut, Py_ssize_t body, double unix_time, bytes checkpoint,
        bytes was,
    ):
        """Return the next frame: *data* with a stamp in place of the nil at *cut*. Sets ``h``."""
        cdef char number[9]
        cdef Py_ssize_t number_size = packed_number(number, <unsigned long long>self.number + 1)
        cdef Py_ssize_t before = PyBytes_GET_SIZE(<PyObject*>self.before)
        cdef Py_ssize_t between = PyBytes_GET_SIZE(<PyObject*>self.between)
        cdef Py_ssize_t first = PyBytes_GET_SIZE(<PyObject*>checkpoint), last = PyBytes_GET_SIZE(<PyObject*>was)
        cdef bytes frame = PyBytes_FromStringAndSize(
            NULL, size + first + before + number_size + between + TAG_SIZE + 6 + 27 + last
        )
        cdef char* start = PyBytes_AS_STRING(<PyObject*>frame)
        cdef char* p = start + cut + 1
        memcpy(start, data, cut)
        start[cut] = <char>(0x80 + (5 if self.is_sealed else 4) + (first > 0) + (last > 0))
        p = copied(p, PyBytes_AS_STRING(<PyObject*>checkpoint), first)
        p = copied(p, PyBytes_AS_STRING(<PyObject*>self.before), before)
        p = copied(p, number, number_size)
        p = copied(p, PyBytes_AS_STRING(<PyObject*>self.between), between)
        p = copied(p, data + TAG, TAG_SIZE)
        p = copied(p, b"\xa4time\xbb", 6)
        put_time(p, unix_time)
        p = copied(p + 27, PyBytes_AS_STRING(<PyObject*>was), last)
        copied(p, data + cut + 1, size - cut - 1)
        if self.is_sealed:
            self.seal(start + body, PyBytes_GET_SIZE(<PyObject*>frame) - body - OPTION, start + cut + 1 + first + 6)
        return frame

    cdef int seal(self, const char* body, Py_ssize_t size, char* mac) except -1:
        """Set ``h`` of a body, and write the MAC of the next record.

        HMAC by the definition in RFC 2104: two calls of SHA-256 take 0.45 of the time of ``hmac.digest``. The label and
        the body are joined for one call, since a copy of a hash that has the label takes as long.
        """
        cdef Py_ssize_t label = PyBytes_GET_SIZE(<PyObject*>SEALED_LABEL), i
        cdef bytes data = PyBytes_FromStringAndSize(NULL, label + size)
        cdef char* p = copied(PyBytes_AS_STRING(<PyObject*>data), PyBytes_AS_STRING(<PyObject*>SEALED_LABEL), label)
        cdef const unsigned char* digits
        memcpy(p, body, size)
        self.h = SHA256(data).digest()
        data = SHA256(self.padded(0x36, self.h)).digest()
        data = SHA256(self.padded(0x5c, data)).digest()
        digits = <const unsigned char*>PyBytes_AS_STRING(<PyObject*>data)
        for i in range(32):
            mac[2 * i] = (<const char*>b"0123456789abcdef")[digits[i] >> 4]
            mac[2 * i + 1] = (<const char*>b"0123456789abcdef")[digits[i] & 15]
        return 0

    cdef bytes padded(self, unsigned char pad, bytes digest):
        """Return one block of the key, each byte changed by *pad*, and a digest."""
        cdef bytes data = PyBytes_FromStringAndSize(NULL, BLOCK + 32)
        cdef char* p = PyBytes_AS_STRING(<PyObject*>data)
        cdef int i
        for i in range(KEY_BYTES):
            p[i] = <char>(self.key[i] ^ pad)
        memset(p + KEY_BYTES, pad, BLOCK - KEY_BYTES)
        memcpy(p + BLOCK, PyBytes_AS_STRING(<PyObject*>digest), 32)
        return data


cdef inline char* copied(char* to, const char* data, Py_ssize_t size) noexcept:
    memcpy(to, data, size)
    return to + size


# -- the gate ----------------------------------------------------------------------------------------------------------


cdef class Gate:
    """The common path of ``send()``: a valid record, in the client's own thread, onto a queue that has room.

    The gate leaves all else to the client. From :meth:`is_open` to the end of ``Queue.put`` no Python code runs. There
    a stamped record gets its number, in the order of the queue.
    """

    cdef Walker walker
    cdef object life, running, outbox, inbox, wake, event, thread, hub, worker, put
    cdef Chain chain
    cdef list under_way

    def __init__(self, Walker walker, life, running, list under_way):
        self.walker, self.life, self.running, self.under_way = walker, life, running, under_way

    cdef object take(self, message):
        """Return True if *message* is accepted; its frame if only that could be made; None if marshmallow decides."""
        cdef double now = ga_now() if _time.time is TIME else _time.time()
        cdef bytes frame
        if self.walker.is_stamped:
            return self.take_stamped(message, now)
        frame = self.walker.frame(message, now)
        if frame is None or not self.is_open():
            return frame
        self.wake_sender()
        try:
            self.put(frame, False)
        except Full:
            return frame
        return True

    cdef object take_stamped(self, message, double now):
        """Like :meth:`take`; a frame that is returned is a draft."""
        cdef char first[FIRST]
        cdef Buffer out
        start(&out, first, self.walker.max_bytes)
        try:
            if self.walker.walk(&out, message, now) != DONE:
                return None
            if not self.is_open():
                return self.walker.taken(&out, now)
            if self.chain is None:
                self.chain = self.outbox.chain
            if self.chain is None or self.chain.is_busy:
                return self.walker.taken(&out, now)
            self.wake_sender()
            return True if self.put_stamped(&out, now) else self.walker.taken(&out, now)
        finally:
            PyMem_Free(out.heap)

    cdef int put_stamped(self, Buffer* out, double now) except -1:
        """Give the record its number, and put it on the queue; return 0 if that is full."""
        cdef Chain chain = self.chain
        cdef bytes frame
        chain.is_busy = True
        try:
            frame = chain.build(out.data, out.used, out.cut, out.body, now, b"", b"")
            if chain.is_sealed:
                chain.evolve(chain.next_key)
            try:
                self.put(frame, False)
            except Full:
                return 0
            chain.number += 1
            if chain.is_sealed:
                memcpy(chain.key, chain.next_key, KEY_BYTES)
                chain.digest.update(chain.h)
            return 1
        finally:
            memset(chain.next_key, 0, KEY_BYTES)
            chain.is_busy = False

    cdef int wake_sender(self) except -1:
        if self.wake.is_armed:  # first: if this fails, nothing was accepted
            self.event.set()
            self.wake.is_armed = False  # until the sender looks for work again
        return 0

    cdef bint is_open(self) except -1:
        outbox = self.life.outbox
        if outbox is None:
            return False
        if outbox is not self.outbox:  # the first use, or after a fork
            worker = self.life.sender.worker
            self.wake, self.event, self.inbox, self.put = outbox.wake, outbox.wake.event, outbox.inbox, outbox.queue.put
            self.thread, self.hub, self.worker = self.life.thread, self.life.thread.hub, worker
            self.chain = None
            self.outbox = outbox if type(outbox.queue) is Queue and QUEUE_IS_COMPILED else None
        return (
            self.outbox is not None
            and self.thread.ident == PyThread_get_thread_ident()
            and self.life.state is self.running
            and not self.under_way
            and self.outbox.is_plain
            and not self.inbox.entries
            and self.hub.loop is not None
            and bool(self.worker.greenlet)
        )


def send(self, msg, *, timeout=0.0):
    """Send by the gate of a client, or by the Python path if the gate does not accept the message."""
    cdef Gate gate = self._gate
    frame = None
    if gate is not None and (timeout is None or timeout == 0.0):
        try:
            frame = gate.take(msg)
        except Exception:  # such as a MemoryError: nothing was accepted
            frame = None
        if frame is True:
            return
    self._send_carefully(msg, timeout, frame)

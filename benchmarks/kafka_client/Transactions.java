import java.time.Duration;
import java.util.Arrays;
import java.util.HashMap;
import java.util.Map;
import java.util.Properties;
import org.apache.kafka.clients.consumer.ConsumerGroupMetadata;
import org.apache.kafka.clients.consumer.OffsetAndMetadata;
import org.apache.kafka.clients.producer.KafkaProducer;
import org.apache.kafka.clients.producer.ProducerRecord;
import org.apache.kafka.common.TopicPartition;
import org.apache.kafka.common.serialization.ByteArraySerializer;

/**
 * The transactions of `benchmarks/transactions.py` by Java's client. Arguments: bootstrap servers, transactional id and
 * group, source, outputs, changelog, partitions, records of a transaction, milliseconds from one to the next,
 * transactions, of which the first are for warming up. Prints one line: the milliseconds of each transaction.
 */
public final class Transactions {
    public static void main(String[] arguments) throws InterruptedException {
        String name = arguments[1];
        int partitions = Integer.parseInt(arguments[5]);
        int records = Integer.parseInt(arguments[6]);
        long intervalNs = (long) (Double.parseDouble(arguments[7]) * 1e6);
        int warmUp = Integer.parseInt(arguments[8]);
        int count = warmUp + Integer.parseInt(arguments[9]);
        Properties settings = new Properties();
        settings.put("bootstrap.servers", arguments[0]);
        settings.put("transactional.id", name);
        settings.put("linger.ms", "100"); // as Kafka Streams has it: a commit sends what waits
        double[] tookMs = new double[count];
        byte[] value = new byte[100];
        try (KafkaProducer<byte[], byte[]> producer =
                new KafkaProducer<>(settings, new ByteArraySerializer(), new ByteArraySerializer())) {
            producer.initTransactions();
            long due = System.nanoTime();
            for (int number = 0; number < count; number++) {
                due += intervalNs;
                Thread.sleep(Duration.ofNanos(Math.max(0, due - System.nanoTime())).toMillis());
                long begun = System.nanoTime();
                producer.beginTransaction();
                for (int record = 0; record < records; record++) {
                    producer.send(new ProducerRecord<>(arguments[3], record % partitions, null, value));
                }
                Map<TopicPartition, OffsetAndMetadata> offsets = new HashMap<>();
                for (int partition = 0; partition < partitions; partition++) {
                    producer.send(new ProducerRecord<>(arguments[4], partition, null, value));
                    offsets.put(new TopicPartition(arguments[2], partition), new OffsetAndMetadata(number));
                }
                producer.sendOffsetsToTransaction(offsets, new ConsumerGroupMetadata(name));
                producer.commitTransaction();
                tookMs[number] = (System.nanoTime() - begun) / 1e6;
            }
        }
        System.out.println(Arrays.toString(Arrays.copyOfRange(tookMs, warmUp, count)));
    }
}
